// A mock of an OpenAI-compatible provider: one thread, epoll, and as little work of its own as possible.
//
//   upstream PORT
//
// The model's name says how it answers: mock-n64-d20-t60 sends 64 chunks " tok0000", " tok0001" ... 20 ms apart, the first
// after 60 ms. With d0 every stream sends one chunk, in a send() of its own, each time around the loop.
// GET /stats counts the answers begun so far and the streams that are open now.
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

#define WHEEL_MS 65536
#define MAX_CHUNKS 1000000
#define EVENTS 512

typedef struct Connection {
  int fd;
  char *in, *out;
  size_t in_length, in_capacity, out_length, out_sent, out_capacity;
  bool waits_to_write;
  bool dead;
  bool queued;    // in the wheel or among the ready ones, which then hold the last reference
  bool answering; // a stream is under way; further requests wait
  unsigned id;
  char model[96];
  int chunks, next_chunk, delay_ms;
  bool wants_usage;
  struct Connection *next_in_slot;
} Connection;

typedef struct {
  Connection **items;
  size_t length, capacity;
} List;

static int poller;
static Connection *wheel[WHEEL_MS];
static long wheel_at_ms;
static int timers;
static List ready, graveyard;
static unsigned answers;
static int open_streams;

static void process(Connection *c);

static long now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000L + t.tv_nsec / 1000000;
}

static void append(List *list, Connection *c) {
  if (list->length == list->capacity) {
    list->capacity = list->capacity ? list->capacity * 2 : 256;
    list->items = realloc(list->items, list->capacity * sizeof *list->items);
  }
  list->items[list->length++] = c;
}

static void watch(Connection *c, int operation) {
  struct epoll_event event = {.events = EPOLLIN | (c->waits_to_write ? EPOLLOUT : 0), .data.ptr = c};
  epoll_ctl(poller, operation, c->fd, &event);
}

static void drop(Connection *c) {
  if (c->dead) return;
  c->dead = true;
  if (c->answering) open_streams--;
  close(c->fd);
  if (!c->queued) append(&graveyard, c);
}

static void bury(void) {
  for (size_t i = 0; i < graveyard.length; i++) {
    free(graveyard.items[i]->in);
    free(graveyard.items[i]->out);
    free(graveyard.items[i]);
  }
  graveyard.length = 0;
}

// ---- writing

static void flush(Connection *c) {
  while (c->out_sent < c->out_length) {
    ssize_t sent = send(c->fd, c->out + c->out_sent, c->out_length - c->out_sent, MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno != EAGAIN) drop(c);
      return;
    }
    c->out_sent += sent;
  }
  c->out_sent = c->out_length = 0;
  if (c->waits_to_write) {
    c->waits_to_write = false;
    watch(c, EPOLL_CTL_MOD);
  }
}

static void write_out(Connection *c, const char *bytes, size_t length) {
  if (c->dead) return;
  if (c->out_length == c->out_sent) {
    ssize_t sent = send(c->fd, bytes, length, MSG_NOSIGNAL);
    if (sent == (ssize_t)length) return;
    if (sent < 0 && errno != EAGAIN) {
      drop(c);
      return;
    }
    if (sent > 0) bytes += sent, length -= sent;
    c->out_sent = c->out_length = 0;
  }
  if (c->out_length + length > c->out_capacity) {
    c->out_capacity = (c->out_length + length) * 2;
    c->out = realloc(c->out, c->out_capacity);
  }
  memcpy(c->out + c->out_length, bytes, length);
  c->out_length += length;
  if (!c->waits_to_write) {
    c->waits_to_write = true;
    watch(c, EPOLL_CTL_MOD);
  }
}

static void respond(Connection *c, const char *body, size_t length) {
  char *response = malloc(256 + length);
  int head = sprintf(response, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n", length);
  memcpy(response + head, body, length);
  write_out(c, response, head + length);
  free(response);
}

// ---- answers

static void queue_timer(Connection *c, int ms) {
  if (ms < 1) ms = 1;
  if (ms >= WHEEL_MS) ms = WHEEL_MS - 1;
  Connection **slot = &wheel[(now_ms() + ms) % WHEEL_MS];
  c->next_in_slot = *slot;
  *slot = c;
  c->queued = true;
  timers++;
}

static void queue_ready(Connection *c) {
  append(&ready, c);
  c->queued = true;
}

static void send_event(Connection *c, const char *choices, const char *more) {
  char event[900], chunk[1000];
  int length = snprintf(event, sizeof event,
                        "data: {\"id\":\"chatcmpl-%08x\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
                        "\"model\":\"%s\",\"service_tier\":\"default\",\"system_fingerprint\":\"fp_mock\",\"choices\":[%s]%s}\n\n",
                        c->id, c->model, choices, more);
  write_out(c, chunk, sprintf(chunk, "%x\r\n%s\r\n", length, event));
}

static void send_next_chunk(Connection *c) {
  char choice[200], usage[120] = "";
  if (c->next_chunk < c->chunks) {
    snprintf(choice, sizeof choice, "{\"index\":0,\"delta\":{%s\"content\":\" tok%04d\"},\"logprobs\":null,\"finish_reason\":null}",
             c->next_chunk == 0 ? "\"role\":\"assistant\"," : "", c->next_chunk);
    c->next_chunk++;
    send_event(c, choice, "");
    return;
  }
  c->answering = false;
  open_streams--;
  send_event(c, "{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\"}", "");
  if (c->wants_usage) {
    snprintf(usage, sizeof usage, ",\"usage\":{\"prompt_tokens\":12,\"completion_tokens\":%d,\"total_tokens\":%d}", c->chunks,
             c->chunks + 12);
    send_event(c, "", usage);
  }
  const char *end = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
  write_out(c, end, strlen(end));
  if (!c->dead) process(c);
}

// Sends what is due and says when to come back.
static void advance(Connection *c) {
  c->queued = false;
  if (c->dead) {
    append(&graveyard, c);
    return;
  }
  send_next_chunk(c);
  if (c->dead || c->queued || !c->answering) return;
  if (c->delay_ms == 0)
    queue_ready(c);
  else
    queue_timer(c, c->delay_ms);
}

static void send_whole_answer(Connection *c) {
  char *body = malloc(800 + c->chunks * 12);
  int length = sprintf(body,
                       "{\"id\":\"chatcmpl-%08x\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"%s\","
                       "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"",
                       c->id, c->model);
  for (int i = 0; i < c->chunks; i++) length += sprintf(body + length, " tok%04d", i);
  length += sprintf(body + length,
                    "\",\"refusal\":null},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":12,"
                    "\"completion_tokens\":%d,\"total_tokens\":%d},\"service_tier\":\"default\",\"system_fingerprint\":\"fp_mock\"}",
                    c->chunks, c->chunks + 12);
  respond(c, body, length);
  free(body);
}

static int number_after(const char *text, const char *mark, int otherwise) {
  const char *found = strstr(text, mark);
  return found ? atoi(found + strlen(mark)) : otherwise;
}

// What follows "key": in a JSON body; good enough for the bodies that gateways send.
static const char *value_of(const char *body, const char *key) {
  const char *found = strstr(body, key);
  if (!found) return NULL;
  found += strlen(key);
  return found + strspn(found, " :");
}

static void answer_chat(Connection *c, const char *body) {
  const char *model = value_of(body, "\"model\""), *stream = value_of(body, "\"stream\"");
  snprintf(c->model, sizeof c->model, "%.*s", model && *model == '"' ? (int)strcspn(model + 1, "\"") : 0, model ? model + 1 : "");
  c->id = ++answers;
  c->chunks = number_after(c->model, "-n", 16);
  c->delay_ms = number_after(c->model, "-d", 0);
  c->next_chunk = 0;
  c->wants_usage = strstr(body, "include_usage") != NULL;
  if (c->chunks > MAX_CHUNKS) c->chunks = MAX_CHUNKS;
  if (!stream || strncmp(stream, "true", 4)) {
    send_whole_answer(c);
    return;
  }
  const char *head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
                     "Transfer-Encoding: chunked\r\n\r\n";
  c->answering = true;
  open_streams++;
  write_out(c, head, strlen(head));
  if (c->dead) return;
  int first_ms = number_after(c->model, "-t", c->delay_ms);
  if (first_ms == 0)
    queue_ready(c);
  else
    queue_timer(c, first_ms);
}

static void answer(Connection *c, const char *path, const char *body) {
  char text[256];
  if (strstr(path, "chat/completions")) {
    answer_chat(c, body);
  } else if (strstr(path, "models")) {
    sprintf(text, "{\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\",\"created\":1700000000,\"owned_by\":\"mock\"}]}");
    respond(c, text, strlen(text));
  } else {
    sprintf(text, "{\"status\":\"ok\",\"answers\":%u,\"open_streams\":%d}", answers, open_streams);
    respond(c, text, strlen(text));
  }
}

// ---- reading

// Joins the pieces of a chunked body in place. Returns where the request ends; NULL while some of it is missing.
static char *join_chunks(char *body, char *end) {
  char *from = body, *to = body;
  if (!memmem(body, end - body, "0\r\n\r\n", 5)) return NULL;
  for (;;) {
    char *data;
    size_t size = strtoul(from, &data, 16);
    data = strstr(data, "\r\n") + 2;
    if (data + size + 2 > end) return NULL;
    if (size == 0) {
      *to = 0;
      return data + 2;
    }
    memmove(to, data, size);
    to += size;
    from = data + size + 2;
  }
}

static void process(Connection *c) {
  while (!c->dead && !c->answering && c->in_length) {
    char *end = c->in + c->in_length, path[128] = "";
    *end = 0;
    char *body = memmem(c->in, c->in_length, "\r\n\r\n", 4);
    if (!body) return;
    *body = 0;
    sscanf(c->in, "%*15s %127s", path);
    const char *length = strcasestr(c->in, "\r\ncontent-length:");
    bool chunked = strcasestr(c->in, "\r\ntransfer-encoding:") != NULL;
    *body = '\r';
    body += 4;
    char *next = body + (length ? strtoul(length + 17, NULL, 10) : 0);
    if (chunked) {
      char *copy = strndup(body, end - body); // joining must leave an unfinished request as it is
      char *past = join_chunks(copy, copy + (end - body));
      if (past) {
        next = body + (past - copy);
        answer(c, path, copy);
      }
      free(copy);
      if (!past) return;
    } else {
      if (next > end) return;
      char saved = *next;
      *next = 0;
      answer(c, path, body);
      *next = saved;
    }
    if (c->dead) return;
    memmove(c->in, next, end - next);
    c->in_length = end - next;
  }
}

static void read_in(Connection *c) {
  for (;;) {
    if (c->in_length == c->in_capacity) {
      c->in_capacity = c->in_capacity ? c->in_capacity * 2 : 4096;
      c->in = realloc(c->in, c->in_capacity + 1);
    }
    ssize_t got = recv(c->fd, c->in + c->in_length, c->in_capacity - c->in_length, 0);
    if (got > 0) {
      c->in_length += got;
      if (c->in_length < c->in_capacity) break;
    } else {
      if (got == 0 || errno != EAGAIN) drop(c);
      break;
    }
  }
  if (!c->dead) process(c);
}

static void accept_all(int listener) {
  int fd, one = 1;
  while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    Connection *c = calloc(1, sizeof *c);
    c->fd = fd;
    watch(c, EPOLL_CTL_ADD);
  }
}

// ---- the loop

static void run_ready(void) {
  size_t count = ready.length;
  Connection **batch = malloc(count * sizeof *batch + 1);
  memcpy(batch, ready.items, count * sizeof *batch);
  ready.length = 0;
  for (size_t i = 0; i < count; i++) advance(batch[i]);
  free(batch);
}

static void run_timers(void) {
  for (long now = now_ms(); wheel_at_ms <= now; wheel_at_ms++) {
    Connection *c = wheel[wheel_at_ms % WHEEL_MS];
    wheel[wheel_at_ms % WHEEL_MS] = NULL;
    while (c) {
      Connection *next = c->next_in_slot;
      timers--;
      advance(c);
      c = next;
    }
  }
}

static int listen_on(int port) {
  int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  if (bind(listener, (void *)&address, sizeof address) || listen(listener, 8192)) {
    perror("upstream: cannot listen");
    exit(1);
  }
  return listener;
}

int main(int count, char **arguments) {
  if (count != 2) {
    fprintf(stderr, "usage: upstream PORT\n");
    return 2;
  }
  signal(SIGPIPE, SIG_IGN);
  int listener = listen_on(atoi(arguments[1]));
  poller = epoll_create1(0);
  struct epoll_event accepts = {.events = EPOLLIN, .data.ptr = NULL}, events[EVENTS];
  epoll_ctl(poller, EPOLL_CTL_ADD, listener, &accepts);
  wheel_at_ms = now_ms();
  for (;;) {
    int got = epoll_wait(poller, events, EVENTS, ready.length ? 0 : timers ? 1 : 1000);
    for (int i = 0; i < got; i++) {
      Connection *c = events[i].data.ptr;
      if (!c) {
        accept_all(listener);
        continue;
      }
      if (!c->dead && events[i].events & EPOLLOUT) flush(c);
      if (!c->dead && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) read_in(c);
    }
    run_ready();
    run_timers();
    bury();
  }
}
