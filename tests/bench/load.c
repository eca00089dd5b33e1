// A load generator for chat completions that checks every token it is sent: one thread, epoll.
//
// The mock upstream numbers its tokens (" tok0000", " tok0001" ...); each answer must hold 0 .. e-1 in order and end as its
// protocol says. Prints one JSON line with counts, errors by kind, and percentiles in milliseconds. SIGTERM ends it before
// its time: what is under way is still read to its end.
//
//   load -p PORT [options]
//     -u PATH     where to POST, by default /v1/chat/completions
//     -P BODY     the body to POST
//     -A          the answer is a 202 with "stream_url", which is read next (times of the 202: "accepted")
//     -G PATH     GET an event stream instead of posting
//     -w          the answer comes whole, not as a stream
//     -c N        connections
//     -e N        tokens in each answer
//     -n N        requests at most
//     -t SECONDS  how long new requests are begun
//     -g SECONDS  how long the last ones may take to end after that
//     -r MS       time over which the connections begin
//     -k          one request per connection
//     -a HEADER   a further header; may be given several times
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define EVENTS 512
#define HEAD_BYTES 8192
#define LINE_BYTES 65536

typedef struct {
  float *values;
  size_t length, capacity;
} Samples;

typedef enum { IDLE, CONNECTING, HEAD, BODY } State;
typedef enum { SIZE, EXTENSION, DATA, DATA_END, TRAILER } ChunkState;
typedef enum { COMPLETE, CUT, NOT_CONNECTED } Outcome;

typedef struct {
  int fd;
  State state;
  bool follows; // reads the stream of a job that was accepted before
  bool finished;
  char stream_path[512];

  int status;
  bool chunked, closes;
  long length, left; // of the body, or of the chunk
  ChunkState chunk;
  char head[HEAD_BYTES], line[LINE_BYTES];
  int head_length, line_length;

  double began, last_token;
  int tokens;
  bool out_of_order, ended;
} Client;

static int port = 8000, clients = 1, expected = 16, ramp_ms = 0;
static const char *path = "/v1/chat/completions", *post_body = "", *get_path = NULL;
static bool accepts_first = false, whole = false, only_one = false;
static long most_requests = 1L << 60;
static double begin_s = 5, drain_s = 10;
static char more_headers[2048] = "";

static int poller, in_flight;
static double start, stop;
static char *request;
static int request_length;
static struct sockaddr_in address;
static Samples first, gap, total, accepted;
static long begun, ok, wrong_status, wrong_content, incomplete, cut, not_connected, tokens;
static char bad_answer[200];
static int bad_status;

static volatile sig_atomic_t told_to_stop;

static void on_sigterm(int number) { told_to_stop = number; }

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

// ---- figures

static void add(Samples *s, double seconds) {
  if (s->length == s->capacity) {
    s->capacity = s->capacity ? s->capacity * 2 : 4096;
    s->values = realloc(s->values, s->capacity * sizeof *s->values);
  }
  s->values[s->length++] = seconds * 1e3;
}

static int by_size(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static void print_samples(const char *name, Samples *s) {
  static const double parts[] = {.5, .9, .99, 1};
  static const char *names[] = {"p50", "p90", "p99", "max"};
  qsort(s->values, s->length, sizeof *s->values, by_size);
  printf(",\"%s\":", name);
  if (!s->length) {
    printf("null");
    return;
  }
  for (int i = 0; i < 4; i++)
    printf("%s\"%s\":%.4f", i ? "," : "{", names[i], s->values[(size_t)(parts[i] * (s->length - 1) + .5)]);
  printf("}");
}

static void print_report(void) {
  double took = now() - start;
  printf("{\"seconds\":%.4f,\"begun\":%ld,\"ok\":%ld,\"tokens\":%ld,\"wrong_status\":%ld,\"wrong_content\":%ld,\"incomplete\":%ld,"
         "\"cut\":%ld,\"not_connected\":%ld,\"unfinished\":%d,\"bad_status\":%d,\"bad_answer\":\"%s\"",
         took, begun, ok, tokens, wrong_status, wrong_content, incomplete, cut, not_connected, in_flight, bad_status, bad_answer);
  print_samples("first", &first);
  print_samples("gap", &gap);
  print_samples("total", &total);
  print_samples("accepted", &accepted);
  printf("}\n");
}

// ---- requests

static void build_request(void) {
  request = malloc(strlen(post_body) + 4096);
  if (get_path)
    request_length = sprintf(request, "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\n%s\r\n", get_path,
                             port, more_headers);
  else
    request_length = sprintf(request,
                             "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nAccept: %s\r\n"
                             "%sContent-Length: %zu\r\n\r\n%s",
                             path, port, whole || accepts_first ? "application/json" : "text/event-stream", more_headers,
                             strlen(post_body), post_body);
}

static void disconnect(Client *c) {
  if (c->fd >= 0) close(c->fd);
  c->fd = -1;
  c->state = IDLE;
}

static void connect_to_server(Client *c) {
  int one = 1;
  c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  if (c->fd < 0) {
    perror("load: socket");
    exit(1);
  }
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  connect(c->fd, (void *)&address, sizeof address); // how it went comes with the first event
  struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
  epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event);
  c->state = CONNECTING;
}

static void send_request(Client *c) {
  char follow[1024];
  const char *bytes = request;
  int length = request_length;
  if (c->follows) {
    length = snprintf(follow, sizeof follow, "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\n\r\n",
                      c->stream_path, port);
    bytes = follow;
  }
  c->state = HEAD;
  c->head_length = c->line_length = c->status = 0;
  c->chunked = c->closes = false;
  c->length = -1;
  c->left = 0;
  c->chunk = SIZE;
  if (send(c->fd, bytes, length, MSG_NOSIGNAL) != length) shutdown(c->fd, SHUT_RDWR); // counted as cut
}

static void begin(Client *c) {
  if (now() >= stop || begun >= most_requests || c->finished) {
    disconnect(c);
    c->finished = true;
    return;
  }
  begun++;
  in_flight++;
  c->follows = c->out_of_order = c->ended = false;
  c->tokens = 0;
  c->began = now();
  if (c->fd < 0)
    connect_to_server(c);
  else
    send_request(c);
}

static void judge(Client *c) {
  if (c->status != 200 && c->status != 202) {
    wrong_status++;
    bad_status = c->status;
    snprintf(bad_answer, sizeof bad_answer, "%.*s", c->line_length, c->line);
    for (char *p = bad_answer; *p; p++)
      if (*p == '"' || *p == '\\' || *p < ' ') *p = ' ';
  } else if (c->out_of_order || c->tokens > expected) {
    wrong_content++;
  } else if (c->tokens < expected || !(c->ended || whole)) {
    incomplete++;
  } else {
    ok++;
    add(&total, now() - c->began);
  }
}

static void finish(Client *c, Outcome outcome) {
  in_flight--;
  if (outcome == COMPLETE) judge(c);
  if (outcome == CUT) cut++;
  if (outcome == NOT_CONNECTED) not_connected++;
  if (outcome != COMPLETE || c->closes) disconnect(c);
  c->finished |= only_one;
  if (c->finished) return;
  if (outcome != COMPLETE || c->status >= 400) usleep(200); // a server that refuses everything must not be flooded
  begin(c);
}

// ---- answers

static void take_line(Client *c, char *line, int length, double at) {
  char *end = line + length, *p = line;
  if (!whole && (length < 5 || memcmp(line, "data:", 5))) return;
  if (memmem(line, length, "[DONE]", 6) || memmem(line, length, "\"type\":\"complete\"", 17)) c->ended = true;
  while ((p = memmem(p, end - p, "tok", 3))) {
    p += 3;
    if (p == end || *p < '0' || *p > '9') continue;
    int number = 0;
    while (p < end && *p >= '0' && *p <= '9') number = number * 10 + *p++ - '0';
    if (number != c->tokens) c->out_of_order = true;
    if (c->tokens++ == 0)
      add(&first, at - c->began);
    else if (!whole)
      add(&gap, at - c->last_token);
    c->last_token = at;
    tokens++;
  }
}

static void take_body(Client *c, char *bytes, int length, double at) {
  bool lines = !whole && !(accepts_first && !c->follows);
  while (length > 0) {
    char *newline = lines ? memchr(bytes, '\n', length) : NULL;
    int part = newline ? newline - bytes : length;
    if (newline && c->line_length == 0) {
      take_line(c, bytes, part, at);
    } else {
      if (c->line_length + part > LINE_BYTES) part = LINE_BYTES - c->line_length; // what is lost is found missing
      memcpy(c->line + c->line_length, bytes, part);
      c->line_length += part;
      if (newline) {
        take_line(c, c->line, c->line_length, at);
        c->line_length = 0;
      }
    }
    if (!newline) return;
    length -= newline + 1 - bytes;
    bytes = newline + 1;
  }
}

static void follow_job(Client *c) {
  char *url = memmem(c->line, c->line_length, "\"stream_url\"", 12);
  if (!url || c->status != 202) {
    finish(c, COMPLETE);
    return;
  }
  add(&accepted, now() - c->began);
  sscanf(url + 12, " : \"%511[^\"]", c->stream_path);
  c->follows = true;
  if (c->closes) {
    disconnect(c);
    connect_to_server(c);
  } else {
    send_request(c);
  }
}

static void end_answer(Client *c, double at) {
  if (accepts_first && !c->follows) {
    follow_job(c);
    return;
  }
  if (c->status == 200 && c->line_length) take_line(c, c->line, c->line_length, at);
  finish(c, COMPLETE);
}

static void take_head(Client *c) {
  char *found;
  c->status = atoi(c->head + 9);
  if ((found = strcasestr(c->head, "\r\ncontent-length:"))) c->length = c->left = atol(found + 17);
  if ((found = strcasestr(c->head, "\r\ntransfer-encoding:"))) c->chunked = true;
  if ((found = strcasestr(c->head, "\r\nconnection:"))) c->closes = !strncasecmp(found + 13 + strspn(found + 13, " "), "close", 5);
  if (!c->chunked && c->length < 0) c->closes = true;
  c->state = BODY;
  if (c->chunked) c->left = 0;
}

// Takes a part of a chunked body; returns how many bytes it was. Sets ``over`` behind the last one.
static int take_chunked(Client *c, char *bytes, int length, double at, bool *over) {
  char byte = *bytes;
  switch (c->chunk) {
  case SIZE:
    if (byte == '\n')
      c->chunk = c->left ? DATA : TRAILER;
    else if (byte == ';')
      c->chunk = EXTENSION;
    else if (byte != '\r')
      c->left = c->left * 16 + (byte <= '9' ? byte - '0' : (byte | 32) - 'a' + 10);
    return 1;
  case EXTENSION:
    if (byte == '\n') c->chunk = c->left ? DATA : TRAILER;
    return 1;
  case DATA: {
    int part = length < c->left ? length : c->left;
    take_body(c, bytes, part, at);
    c->left -= part;
    if (!c->left) c->chunk = DATA_END;
    return part;
  }
  case DATA_END:
    if (byte == '\n') c->chunk = SIZE;
    return 1;
  case TRAILER:
    *over = byte == '\n';
    return 1;
  }
  return length;
}

static void take(Client *c, char *bytes, int length, double at) {
  while (length > 0) {
    if (c->state == HEAD) {
      int before = c->head_length, part = length < HEAD_BYTES - 1 - before ? length : HEAD_BYTES - 1 - before;
      memcpy(c->head + before, bytes, part);
      c->head_length += part;
      c->head[c->head_length] = 0;
      char *end = strstr(c->head, "\r\n\r\n");
      if (!end) return;
      part = end + 4 - c->head - before;
      end[2] = 0;
      bytes += part;
      length -= part;
      take_head(c);
      if (c->status == 100) c->state = HEAD, c->head_length = 0;
      if (c->state == BODY && !c->chunked && c->length == 0) {
        end_answer(c, at);
        return;
      }
    } else if (c->state == BODY && c->chunked) {
      bool over = false;
      int part = take_chunked(c, bytes, length, at, &over);
      bytes += part;
      length -= part;
      if (over) {
        end_answer(c, at);
        return;
      }
    } else if (c->state == BODY) {
      int part = c->length >= 0 && length > c->left ? c->left : length;
      take_body(c, bytes, part, at);
      bytes += part;
      length -= part;
      c->left -= part;
      if (c->length >= 0 && !c->left) {
        end_answer(c, at);
        return;
      }
    } else {
      return;
    }
  }
}

// ---- the loop

static void on_event(Client *c, unsigned events) {
  static char bytes[262144];
  if (c->fd < 0) return;
  if (c->state == CONNECTING) {
    if (!(events & (EPOLLOUT | EPOLLERR | EPOLLHUP))) return;
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
      finish(c, NOT_CONNECTED);
      return;
    }
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
    send_request(c);
    return;
  }
  ssize_t got = recv(c->fd, bytes, sizeof bytes, 0);
  if (got > 0)
    take(c, bytes, got, now());
  else if (got < 0 && errno == EAGAIN)
    return;
  else if (c->state == BODY && !c->chunked && c->length < 0)
    end_answer(c, now());
  else if (c->finished)
    disconnect(c);
  else
    finish(c, CUT);
}

static void read_options(int count, char **words) {
  int option;
  while ((option = getopt(count, words, "p:u:P:AG:wc:e:n:t:g:r:ka:")) != -1) switch (option) {
    case 'p': port = atoi(optarg); break;
    case 'u': path = optarg; break;
    case 'P': post_body = optarg; break;
    case 'A': accepts_first = true; break;
    case 'G': get_path = optarg; break;
    case 'w': whole = true; break;
    case 'c': clients = atoi(optarg); break;
    case 'e': expected = atoi(optarg); break;
    case 'n': most_requests = atol(optarg); break;
    case 't': begin_s = atof(optarg); break;
    case 'g': drain_s = atof(optarg); break;
    case 'r': ramp_ms = atoi(optarg); break;
    case 'k': only_one = true; break;
    case 'a':
      if (strlen(more_headers) + strlen(optarg) + 3 > sizeof more_headers) exit(2);
      strcat(strcat(more_headers, optarg), "\r\n");
      break;
    default: exit(2);
    }
}

int main(int count, char **words) {
  signal(SIGPIPE, SIG_IGN);
  signal(SIGTERM, on_sigterm);
  read_options(count, words);
  build_request();
  address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  poller = epoll_create1(0);
  Client **all = calloc(clients, sizeof *all);
  for (int i = 0; i < clients; i++) {
    all[i] = calloc(1, sizeof **all);
    all[i]->fd = -1;
  }
  start = now();
  stop = start + begin_s;
  struct epoll_event events[EVENTS];
  for (int started = 0;;) {
    double at = now();
    if (told_to_stop && stop > at) stop = at;
    while (started < clients && (at - start) * 1e3 >= (double)ramp_ms * started / clients) begin(all[started++]);
    if (at > stop + drain_s || (started == clients && in_flight == 0)) break;
    int got = epoll_wait(poller, events, EVENTS, started < clients ? 1 : 50);
    for (int i = 0; i < got; i++) on_event(events[i].data.ptr, events[i].events);
  }
  print_report();
  return 0;
}
