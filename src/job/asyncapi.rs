//! The worker's queues and messages as an AsyncAPI 3 document, made from the types that read and write them.
//!
//! It speaks for the worker, as AsyncAPI has it: what the worker receives is what its users send.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use super::output::Chunk;
use super::raw::RawJob;
use super::reply::Reply;

/// What the queues and the exchange are called.
#[derive(Clone, Copy, Debug)]
pub struct BrokerNames<'a> {
    /// Where jobs come from, the one first that is for whoever has no choice.
    pub jobs: &'a [&'a str],
    /// Where results go that have no reply queue.
    pub results: &'a str,
    /// Where messages go that cannot be handled.
    pub dead: &'a str,
    /// The exchange by which every worker is told something.
    pub control: &'a str,
}

/// The document. `Command` is what workers are told, `Pong` what they say of themselves.
pub fn document<Command: JsonSchema, Pong: JsonSchema>(names: &BrokerNames<'_>) -> Value {
    let settings = || SchemaSettings::draft07().with(|s| s.definitions_path = "/components/schemas".into());
    let mut read = settings().for_deserialize().into_generator();
    let mut written = settings().for_serialize().into_generator();
    let messages = json!({
        "job": {
            "summary": "A program to run",
            "payload": read.subschema_for::<RawJob>(),
            "headers": headers(&[TRACE, SENT]),
            "correlationId": correlation(),
            "x-amqp-properties": {
                "reply_to": "Where output and result go: a queue, or amq.rabbitmq.reply-to; the results queue where absent.",
                "correlation_id": "Comes back with output and result.",
                "message_id": "The job's id where its body names none.",
                "timestamp": "When it was published, for the time it waited.",
                "expiration": "Milliseconds from there; past them the job is not run.",
            },
        },
        "output": reply("A piece of output, while a job with `stream` runs", &written.subschema_for::<Chunk>()),
        "result": reply("What became of a job", &written.subschema_for::<Reply>()),
        "command": {
            "summary": "Something for every worker",
            "payload": read.subschema_for::<Command>(),
            "correlationId": correlation(),
        },
        "pong": reply("What a worker says of itself", &written.subschema_for::<Pong>()),
        "dead": {
            "summary": "A message that could not be handled, as it came",
            "payload": {},
            "headers": headers(&[&[
                ("x-sandpiper-reason", "string", "Why it is here."),
                ("x-sandpiper-attempt", "integer", "How often it was delivered."),
                ("x-sandpiper-worker", "string", "Who gave it up; absent where it was the broker."),
                ("x-sandpiper-at", "string", "When, in RFC 3339."),
            ]]),
        },
    });
    let mut schemas = read.take_definitions(true);
    schemas.extend(written.take_definitions(true));
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Sandpiper",
            "version": env!("CARGO_PKG_VERSION"),
            "description": env!("CARGO_PKG_DESCRIPTION"),
            "license": { "name": env!("CARGO_PKG_LICENSE") },
        },
        "defaultContentType": "application/json",
        "channels": {
            "jobs": jobs(names.jobs),
            "replies": {
                "address": null,
                "description": "Whatever a job or a command names in `reply_to`.",
                "messages": references(&["output", "result", "pong"]),
            },
            "results": queue(names.results, "Results without a reply queue, or whose reply queue is gone or did not take them.", &["result"]),
            "dead": queue(names.dead, "What an operator has to look at.", &["dead"]),
            "control": {
                "address": names.control,
                "description": "An exchange: every worker hears every message. The routing key is empty.",
                "messages": references(&["command"]),
                "bindings": { "amqp": {
                    "is": "routingKey",
                    "exchange": {
                        "name": names.control, "type": "fanout", "durable": true, "autoDelete": false, "vhost": "/",
                    },
                    "bindingVersion": BINDINGS,
                } },
            },
        },
        "operations": {
            "runJob": {
                "action": "receive",
                "summary": "Run a job, and say what became of it. Acked when the broker has confirmed the result.",
                "channel": channel("jobs"),
                "messages": [on("jobs", "job")],
                "bindings": { "amqp": { "ack": true, "bindingVersion": BINDINGS } },
                "reply": answer(&["output", "result"]),
            },
            "leaveResult": sending("results", "result", "Where nobody is there to take a result."),
            "bury": sending("dead", "dead", "What is no job, or kills worker after worker."),
            "obey": {
                "action": "receive",
                "summary": "End a job; or say who is there.",
                "channel": channel("control"),
                "messages": [on("control", "command")],
                "reply": answer(&["pong"]),
            },
        },
        "components": { "messages": messages, "schemas": schemas },
    })
}

/// The version of AsyncAPI's AMQP bindings that is written here.
const BINDINGS: &str = "0.3.0";

/// Headers by name, type and meaning.
type Headers<'a> = &'a [(&'a str, &'a str, &'a str)];

const TRACE: Headers<'_> = &[
    ("traceparent", "string", "W3C trace context, passed on to output and result."),
    ("tracestate", "string", "W3C trace context, passed on to output and result."),
];

const SENT: Headers<'_> = &[(
    "timestamp_in_ms",
    "integer",
    "When it was published, in milliseconds since 1970; the property `timestamp` has whole seconds.",
)];

fn headers(groups: &[Headers<'_>]) -> Value {
    let properties: serde_json::Map<String, Value> = groups
        .iter()
        .flat_map(|group| group.iter())
        .map(|(name, kind, meaning)| ((*name).to_owned(), json!({ "type": kind, "description": meaning })))
        .collect();
    json!({ "type": "object", "properties": properties })
}

/// AMQP's properties have no place of their own in AsyncAPI; its expressions call them headers.
fn correlation() -> Value {
    json!({ "location": "$message.header#/correlation_id" })
}

/// A message to whoever asked.
fn reply(summary: &str, payload: &schemars::Schema) -> Value {
    json!({
        "summary": summary,
        "payload": payload,
        "headers": headers(&[TRACE]),
        "correlationId": correlation(),
        "x-amqp-properties": {
            "type": "The name of this message: output, result or pong.",
            "correlation_id": "That of the message it answers.",
            "message_id": "The same for every duplicate: delivery is at least once.",
            "timestamp": "When it was sent.",
        },
    })
}

fn queue(name: &str, description: &str, messages: &[&str]) -> Value {
    json!({
        "address": name,
        "description": description,
        "messages": references(messages),
        "bindings": { "amqp": {
            "is": "queue",
            "queue": { "name": name, "durable": true, "exclusive": false, "autoDelete": false, "vhost": "/" },
            "bindingVersion": BINDINGS,
        } },
    })
}

/// One channel for all queues of jobs: several are one address with a parameter.
fn jobs(names: &[&str]) -> Value {
    let mut channel = queue(names.first().unwrap_or(&""), "Jobs. Several workers share them.", &["job"]);
    if let [first, _, ..] = names {
        channel["address"] = "{queue}".into();
        channel["parameters"] = json!({
            "queue": { "description": "A queue of jobs; each has its share.", "enum": names, "default": first },
        });
        if let Some(queue) = channel["bindings"]["amqp"]["queue"].as_object_mut() {
            queue.remove("name");
        }
    }
    channel
}

fn sending(to: &str, message: &str, summary: &str) -> Value {
    json!({
        "action": "send",
        "summary": summary,
        "channel": channel(to),
        "messages": [on(to, message)],
        "bindings": { "amqp": { "deliveryMode": 2, "mandatory": true, "bindingVersion": BINDINGS } },
    })
}

fn answer(messages: &[&str]) -> Value {
    json!({
        "address": { "location": "$message.header#/reply_to" },
        "channel": channel("replies"),
        "messages": messages.iter().map(|name| on("replies", name)).collect::<Vec<_>>(),
    })
}

fn channel(name: &str) -> Value {
    json!({ "$ref": format!("#/channels/{name}") })
}

fn on(channel: &str, message: &str) -> Value {
    json!({ "$ref": format!("#/channels/{channel}/messages/{message}") })
}

fn references(messages: &[&str]) -> Value {
    let reference =
        |name: &&str| ((*name).to_owned(), json!({ "$ref": format!("#/components/messages/{name}") }));
    messages.iter().map(reference).collect::<serde_json::Map<_, _>>().into()
}
