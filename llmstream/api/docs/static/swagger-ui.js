"use strict";

SwaggerUIBundle({
  dom_id: "#page",
  url: "openapi.json",
  deepLinking: true,
  validatorUrl: null, // the default sends the document's address to another host
});
