//! The description of the interface for other programs ([OpenAPI 3.1](https://spec.openapis.org/oas/v3.1.0)).

use serde_json::{Map, Value, json};

use super::capabilities::{Flag, flags};
use super::job::Kind;

/// The address of the description.
pub(super) const ADDRESS: &str = "/v1/openapi.json";

/// Every kind of job, and the fields of its request besides `kind` and `settings`. Those marked are required.
const KINDS: [(Kind, &[(&str, bool)]); 6] = [
    (
        Kind::Analogy,
        &[("pairs", true), ("targets", true), ("name", false)],
    ),
    (Kind::Learn, &[("pairs", true), ("name", false)]),
    (
        Kind::Apply,
        &[
            ("difference", true),
            ("targets", true),
            ("strengths", false),
        ],
    ),
    (Kind::Caption, &[("targets", true)]),
    (Kind::Generate, &[("prompt", true), ("difference", false)]),
    (Kind::Download, &[]),
];

/// The whole description.
pub(super) fn description() -> Value {
    let mut schemas = schemas();
    let mut one_of = Vec::new();
    for (kind, fields) in KINDS {
        let name = format!("{}Job", capitalised(kind.name()));
        one_of.push(reference(&name));
        schemas.insert(name, request(kind, fields));
    }
    schemas.insert("JobRequest".to_owned(), json!({ "oneOf": one_of }));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "dinv serve",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Learns the difference between two pictures and applies it to others, on this machine.",
            "license": { "name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "security": [{}, { "token": [] }],
        "paths": paths(),
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": { "type": "http", "scheme": "bearer", "description": "Only with `--token` or DINV_TOKEN." },
            },
        },
    })
}

fn capitalised(word: &str) -> String {
    let (first, rest) = word.split_at(1);
    first.to_uppercase() + rest
}

fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

/// A request for a job of one kind.
fn request(kind: Kind, fields: &[(&str, bool)]) -> Value {
    let settings: Map<String, Value> = flags(kind)
        .into_iter()
        .map(|flag| (flag.name.replace('-', "_"), setting(&flag)))
        .collect();
    let mut properties = json!({
        "kind": { "const": kind.name() },
        "settings": { "type": "object", "properties": settings, "additionalProperties": false },
    });
    for (name, _) in fields {
        properties[*name] = field(name);
    }
    let mut required: Vec<&str> = vec!["kind"];
    let fields = fields.iter().filter(|(_, required)| *required);
    required.extend(fields.map(|(name, _)| *name));
    if kind == Kind::Download {
        let settings = &mut properties["settings"];
        settings["properties"]["model"] = json!({ "type": "string" });
        settings["required"] = json!(["model"]);
        required.push("settings");
    }
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

fn field(name: &str) -> Value {
    let list = |schema: &str| json!({ "type": "array", "minItems": 1, "items": reference(schema) });
    match name {
        "pairs" => list("Pair"),
        "targets" => list("Target"),
        "strengths" => json!({ "type": "array", "items": { "type": "number" } }),
        _ => json!({ "type": "string" }),
    }
}

fn setting(flag: &Flag) -> Value {
    let mut schema = match flag.kind {
        "bool" => json!({ "type": "boolean" }),
        "number" => json!({ "type": "number" }),
        "choice" => json!({ "enum": flag.values }),
        _ => json!({ "type": ["string", "number"] }),
    };
    schema["description"] = json!(flag.help);
    schema
}

fn schemas() -> Map<String, Value> {
    let text = || json!({ "type": "string" });
    let picture = json!({
        "type": "string",
        "description": "A data URL, or the address of a picture of this server.",
    });
    let time = json!({ "type": "string", "format": "date-time" });
    let all = json!({
        "Pair": {
            "type": "object",
            "properties": {
                "a": picture, "a_prime": picture, "caption_a": text(), "caption_a_prime": text(),
            },
            "required": ["a", "a_prime"],
            "additionalProperties": false,
        },
        "Target": {
            "type": "object",
            "properties": { "picture": picture, "caption": text(), "name": text() },
            "required": ["picture"],
            "additionalProperties": false,
        },
        "Job": {
            "type": "object",
            "properties": {
                "id": text(),
                "kind": { "enum": Kind::ALL.map(Kind::name) },
                "state": { "enum": ["queued", "running", "done", "failed", "cancelled"] },
                "position": { "type": "integer", "description": "The place in the queue, from 1." },
                "created": time, "started": time, "finished": time,
                "request": { "type": "object" },
                "results": { "type": "array", "items": { "type": "object" } },
                "notes": { "type": "array", "items": text() },
                "commands": { "type": "array", "items": { "type": "array", "items": text() } },
                "stopping": { "type": "boolean", "description": "It stops at its next step." },
                "progress": {
                    "type": "object",
                    "properties": {
                        "stage": text(), "step": { "type": "integer" }, "of": { "type": "integer" },
                        "seconds_left": { "type": "number" },
                    },
                },
                "losses": { "type": "array", "items": { "type": "array", "items": { "type": "number" } } },
                "error": reference("Problem"),
            },
            "required": ["id", "kind", "state", "created", "request", "results", "notes", "commands"],
        },
        "Difference": {
            "type": "object",
            "properties": {
                "name": text(), "created": time, "model": { "type": ["string", "null"] },
                "tokens": { "type": "integer" }, "bytes": { "type": "integer" }, "url": text(),
                "belongs_to": text(), "thumbnail": text(),
            },
            "required": ["name", "created", "tokens", "bytes", "url", "belongs_to"],
        },
        "Model": {
            "type": "object",
            "properties": {
                "name": text(), "on_disk": { "type": "boolean" }, "title": text(), "licence": text(),
                "bytes": { "type": "integer", "description": "Its size, or about that of its download." },
                "learning": {
                    "type": "array",
                    "description": "Estimates of the memory of learning.",
                    "items": {
                        "type": "object",
                        "properties": { "dtype": text(), "memory": text(), "bytes": { "type": "integer" } },
                    },
                },
            },
            "required": ["name", "on_disk"],
        },
        "Export": {
            "type": "object",
            "properties": {
                "format": text(), "program": text(), "word": text(),
                "files": { "type": "array", "items": { "type": "object", "properties": { "name": text(), "url": text() } } },
                "usage": { "type": "object", "additionalProperties": { "type": ["string", "number"] } },
                "notes": { "type": "array", "items": text() },
            },
            "required": ["format", "word", "files", "usage", "notes"],
        },
        "Problem": {
            "type": "object",
            "properties": { "message": text(), "hint": text(), "field": text() },
            "required": ["message"],
        },
        "Error": {
            "type": "object",
            "properties": { "error": reference("Problem") },
            "required": ["error"],
        },
    });
    match all {
        Value::Object(all) => all,
        _ => Map::new(),
    }
}

/// An operation: its summary, its answer, and the statuses of its refusals.
fn operation(summary: &str, status: &str, answer: &Value, refusals: &[&str]) -> Value {
    let mut responses = Map::new();
    responses.insert(status.to_owned(), answer.clone());
    for refusal in refusals.iter().chain(&["401", "403"]) {
        let answer = json!({
            "description": meaning(refusal),
            "content": { "application/json": { "schema": reference("Error") } },
        });
        responses.insert((*refusal).to_owned(), answer);
    }
    json!({ "summary": summary, "responses": responses })
}

fn meaning(status: &str) -> &'static str {
    match status {
        "401" => "The token is missing or wrong.",
        "403" => "The request comes from another site, or names another host.",
        "404" => "There is no such thing.",
        "409" => "The current state does not allow it.",
        "413" => "The request is too large.",
        "422" => "A field is wrong; `field` names it.",
        "429" => "The queue is full.",
        "500" => "The job failed.",
        "507" => "The server's disk is full.",
        "503" => "Too many clients follow jobs, or the server stops.",
        _ => "The request was refused.",
    }
}

fn with_body(mut operation: Value, kind: &str, schema: &Value) -> Value {
    operation["requestBody"] = json!({
        "required": true,
        "content": { (kind): { "schema": schema } },
    });
    operation
}

fn in_json(description: &str, schema: &Value) -> Value {
    json!({
        "description": description,
        "content": { "application/json": { "schema": schema } },
    })
}

fn in_bytes(description: &str, kind: &str) -> Value {
    json!({
        "description": description,
        "content": { (kind): { "schema": { "type": "string", "contentEncoding": "binary" } } },
    })
}

fn list(name: &str, schema: &str) -> Value {
    let items = json!({ "type": "array", "items": reference(schema) });
    json!({ "type": "object", "properties": { (name): items } })
}

fn parameter(name: &str, place: &str, description: &str) -> Value {
    json!({
        "name": name, "in": place, "required": place == "path", "description": description,
        "schema": { "type": "string" },
    })
}

/// An object of one text.
fn named(field: &str) -> Value {
    json!({
        "type": "object", "properties": { (field): { "type": "string" } }, "required": [field],
        "additionalProperties": false,
    })
}

/// Every address.
fn paths() -> Value {
    let parts = [of_server(), of_jobs(), of_differences(), of_doors()];
    let all = parts.into_iter().filter_map(|part| match part {
        Value::Object(part) => Some(part),
        _ => None,
    });
    Value::Object(all.flatten().collect())
}

fn of_server() -> Value {
    let object = json!({ "type": "object" });
    let all = in_json("All of them.", &object);
    let models = in_json(
        "The models, the free disk, and on a processor the available memory, in bytes.",
        &list("models", "Model"),
    );
    let text = in_json("Its text.", &object);
    json!({
        "/v1/openapi.json": {
            "get": operation("This description", "200", &in_json("OpenAPI 3.1.", &object), &[]),
        },
        "/v1/capabilities": {
            "get": operation("Limits and settings", "200", &all, &[]),
        },
        "/v1/models": {
            "get": operation("The models, with the memory that learning on them takes", "200", &models, &[]),
        },
        "/v1/example/{name}": {
            "parameters": [parameter("name", "path", "a.png, a_prime.png or b.png")],
            "get": operation("A picture of the built-in example", "200", &in_bytes("The picture.", "image/png"), &["404"]),
        },
        "/v1/read-png": {
            "post": with_body(
                operation("What a picture made by dinv says of itself", "200", &text, &["413", "422"]),
                "application/json",
                &named("picture"),
            ),
        },
    })
}

fn of_jobs() -> Value {
    let job = in_json("The job.", &reference("Job"));
    let mut counted = list("jobs", "Job");
    counted["properties"]["count"] = json!({ "type": "integer" });
    let nothing = json!({ "description": "Done." });
    let id = [parameter("id", "path", "The job.")];
    let mut post = with_body(
        operation("Queue a job", "202", &job, &["413", "422", "429", "507"]),
        "application/json",
        &reference("JobRequest"),
    );
    post["parameters"] = json!([parameter(
        "Idempotency-Key",
        "header",
        "A repeated request with the same key gets the first one's job."
    )]);
    let events = json!({
        "description": "Server-sent events `job`, `loss` and `preview`, a data URL of the picture that is being drawn, until the job ends.",
        "content": { "text/event-stream": { "schema": { "type": "string" } } },
    });
    let mut watch = operation("Follow a job", "200", &events, &["404", "503"]);
    watch["parameters"] = json!([parameter(
        "Last-Event-ID",
        "header",
        "Continues after this event."
    )]);
    json!({
        "/v1/jobs": {
            "parameters": [
                parameter("limit", "query", "At most so many of the newest, besides the running one."),
                parameter("kinds", "query", "Only jobs of these kinds, separated by commas."),
            ],
            "get": operation(
                "Jobs, newest first, and the number of all", "200", &in_json("The jobs.", &counted), &["422"],
            ),
            "post": post,
        },
        "/v1/jobs/{id}": {
            "parameters": id,
            "get": operation("A job", "200", &job, &["404"]),
            "delete": operation("Remove a job that is not running, with its files", "204", &nothing, &["404", "409"]),
        },
        "/v1/jobs/{id}/events": { "parameters": id, "get": watch },
        "/v1/jobs/{id}/cancel": {
            "parameters": id,
            "post": operation("Stop a job at its next step; again, immediately", "200", &job, &["404", "409"]),
        },
        "/v1/jobs/{id}/first": {
            "parameters": id,
            "post": operation("Move a waiting job to the front of the queue", "200", &job, &["404", "409"]),
        },
        "/v1/jobs/{id}/retry": {
            "parameters": id,
            "post": operation("Queue the same request again", "202", &job, &["404", "409", "413", "422", "429", "507"]),
        },
        "/v1/jobs/{id}/files/{name}": {
            "parameters": [parameter("id", "path", "The job."), parameter("name", "path", "The file.")],
            "get": operation("A file of a job", "200", &in_bytes("The file.", "image/png"), &["404"]),
        },
        "/v1/jobs/{id}/zip": {
            "parameters": id,
            "get": operation("All result pictures", "200", &in_bytes("The pictures.", "application/zip"), &["404"]),
        },
    })
}

fn of_differences() -> Value {
    let difference = in_json("The difference.", &reference("Difference"));
    let nothing = json!({ "description": "Done." });
    let name = [parameter("name", "path", "The difference.")];
    let bytes = json!({ "type": "string", "contentEncoding": "binary" });
    let word = parameter(
        "word",
        "query",
        "The word for the difference in that program.",
    );
    let reverse = parameter("reverse", "query", "`true` for the reverse, from A′ to A.");
    json!({
        "/v1/differences": {
            "get": operation(
                "All differences, newest first", "200", &in_json("The differences.", &list("differences", "Difference")), &[],
            ),
        },
        "/v1/differences/{name}": {
            "parameters": name,
            "get": operation("The file", "200", &in_bytes("The file.", "application/octet-stream"), &["404"]),
            "put": with_body(
                operation("Add a difference", "201", &difference, &["409", "413", "422", "507"]),
                "application/octet-stream",
                &bytes,
            ),
            "patch": with_body(
                operation("Rename", "200", &difference, &["404", "409", "413", "422", "507"]), "application/json", &named("name"),
            ),
            "delete": operation("Remove", "204", &nothing, &["404"]),
        },
        "/v1/differences/{name}/exports": {
            "parameters": [name[0], word, reverse],
            "get": operation(
                "The difference for each program that reads it, with what to type there", "200",
                &in_json("The exports.", &list("exports", "Export")), &["404", "422"],
            ),
        },
        "/v1/differences/{name}/exports/{format}/{file}": {
            "parameters": [
                name[0], parameter("format", "path", "The program."), parameter("file", "path", "The file."), word, reverse,
            ],
            "get": operation(
                "A file for a program", "200", &in_bytes("The file.", "application/octet-stream"), &["404", "422"],
            ),
        },
        "/v1/differences/{name}/thumbnail": {
            "parameters": name,
            "get": operation("A next to A′", "200", &in_bytes("The picture.", "image/png"), &["404"]),
        },
    })
}

/// The interfaces of other programs.
fn of_doors() -> Value {
    let object = json!({ "type": "object" });
    let refusals = ["400", "404", "409", "413", "422", "429", "500", "503"];
    let text = || json!({ "type": "string" });
    let form = json!({
        "type": "object",
        "properties": {
            "image": { "type": "array", "items": { "type": "string", "contentEncoding": "binary" } },
            "model": { "type": "string", "description": "The difference: NAME or NAME:STRENGTH." },
            "prompt": { "type": "string", "description": "The caption of the pictures, or empty." },
            "response_format": { "enum": ["b64_json", "url"] },
        },
        "required": ["image", "model"],
    });
    let img2img = json!({
        "type": "object",
        "properties": {
            "init_images": { "type": "array", "items": text() },
            "prompt": { "type": "string", "description": "<dinv:NAME:STRENGTH> and the caption of the pictures, or nothing." },
            "negative_prompt": text(), "seed": { "type": "integer" }, "steps": { "type": "integer" },
            "override_settings": { "type": "object" },
        },
        "required": ["init_images", "prompt"],
    });
    json!({
        "/v1/images/edits": {
            "post": with_body(
                operation("Apply a difference, as OpenAI's clients ask", "200", &in_json("The pictures.", &object), &refusals),
                "multipart/form-data",
                &form,
            ),
        },
        "/sdapi/v1/img2img": {
            "post": with_body(
                operation(
                    "Apply a difference, as clients of Stable Diffusion web UI ask", "200",
                    &in_json("The pictures.", &object), &refusals,
                ),
                "application/json",
                &img2img,
            ),
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_download_names_its_model() {
        let request = &description()["components"]["schemas"]["DownloadJob"];
        let settings = &request["properties"]["settings"];
        assert_eq!(settings["properties"]["model"]["type"], "string");
        assert_eq!(settings["required"], json!(["model"]));
        assert_eq!(request["required"], json!(["kind", "settings"]));
    }

    /// The description names every address and method that the server has, and no other.
    #[test]
    fn every_route_is_described() {
        let source = include_str!("http.rs");
        let start = source.find("fn router(").unwrap();
        let source = &source[start..start + source[start..].find("\n}\n").unwrap()];
        let mut served = BTreeSet::new();
        for route in source.split(".route(").skip(1) {
            let address = match route.split('"').nth(1) {
                Some(address) if address.contains("/v1/") => address,
                _ if route.contains("openapi::ADDRESS") => ADDRESS,
                _ => continue, // the page
            };
            let handlers = route.split(address).last().unwrap_or(route);
            for method in ["get", "put", "post", "patch", "delete"] {
                let is_there = [" ", "\n", ".", ","]
                    .iter()
                    .any(|before| handlers.contains(&format!("{before}{method}(")));
                if is_there {
                    served.insert(format!("{method} {address}"));
                }
            }
        }
        let description = description();
        let mut described = BTreeSet::new();
        for (address, operations) in description["paths"].as_object().unwrap() {
            for method in operations.as_object().unwrap().keys() {
                if method != "parameters" {
                    described.insert(format!("{method} {address}"));
                }
            }
        }
        assert_eq!(described, served);
        assert!(served.len() > 15, "{served:?}");
    }

    #[test]
    fn settings_have_the_types_of_their_flags() {
        let description = description();
        let schemas = &description["components"]["schemas"];
        let settings = &schemas["LearnJob"]["properties"]["settings"]["properties"];
        assert_eq!(settings["steps"]["type"], "number");
        assert_eq!(
            settings["delta"]["enum"],
            json!(["interpolated", "image", "text"])
        );
        assert_eq!(settings["no_memory_check"]["type"], "boolean");
        assert_eq!(
            schemas["ApplyJob"]["required"],
            json!(["kind", "difference", "targets"])
        );
        let one_of = schemas["JobRequest"]["oneOf"].as_array().unwrap();
        assert_eq!(one_of.len(), Kind::ALL.len());
    }
}
