//! The sending. Spans are made when their jobs have ended, of times that were taken on the way, so that nothing of
//! this stands between a job and its result; they leave in batches, by a thread of the library's own.

use std::time::Duration;

use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{Span as _, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};

use super::{EndedJob, TracesError, endpoint, first_said};
use crate::job;

/// For the last batch, when the worker ends: a collector that is away must not hold it up.
const LAST_BATCH: Duration = Duration::from_secs(2);

/// Where spans go; nowhere unless told. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Traces(Option<(SdkTracerProvider, SdkTracer)>);

/// A job's span, which ends when this is dropped.
#[derive(Debug)]
#[must_use = "it ends when it is dropped"]
pub struct Span {
    _context: Option<Context>,
}

impl Traces {
    /// Reads OpenTelemetry's variables; `worker` is this one's name among others.
    ///
    /// # Errors
    /// Where they ask for what this cannot do.
    pub fn start(worker: &str) -> Result<Self, TracesError> {
        let Some((variable, value)) = endpoint() else { return Ok(Self(None)) };
        if !value.starts_with("http://") {
            let remedy = "must begin with http://; a collector beside the worker can send on by TLS";
            return Err(TracesError::Unsupported { variable, value, remedy });
        }
        let protocol = first_said(["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"]);
        if let Some((variable, value)) = protocol.filter(|(_, value)| value != "http/protobuf") {
            let remedy = "must be http/protobuf, which collectors take on port 4318";
            return Err(TracesError::Unsupported { variable, value, remedy });
        }
        let exporter = SpanExporter::builder()
            .with_http()
            .build()
            .map_err(|error| TracesError::Exporter(error.to_string()))?;
        let named = Resource::builder().build();
        let mut resource = Resource::builder()
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attribute(KeyValue::new("service.instance.id", worker.to_owned()));
        let given = named.iter().find(|(name, _)| name.as_str() == "service.name");
        if given.is_none_or(|(_, value)| value.as_str().starts_with("unknown_service")) {
            resource = resource.with_service_name("sandpiper");
        }
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource.build())
            .build();
        let tracer = provider.tracer("sandpiper");
        tracing::info!(endpoint = value, "traces are sent");
        Ok(Self(Some((provider, tracer))))
    }

    /// The span of a job that has ended, but for its result's way back. It has one of its start and one of its run
    /// below it.
    pub fn job(&self, ended: &EndedJob<'_>) -> Span {
        Span { _context: self.0.as_ref().map(|(_, tracer)| job(tracer, ended)) }
    }

    /// Sends what has not been sent.
    pub async fn close(&self) {
        let Some((provider, _)) = self.0.clone() else { return };
        let closing = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(LAST_BATCH));
        if let Ok(Err(error)) = closing.await {
            tracing::warn!(error = %error, "the last traces could not be sent");
        }
    }
}

fn job(tracer: &SdkTracer, ended: &EndedJob<'_>) -> Context {
    let parent = TraceContextPropagator::new().extract(&Requester(ended));
    let outcome = ended.outcome;
    let status = outcome.status.as_str();
    let mut attributes = vec![
        KeyValue::new("messaging.system", "rabbitmq"),
        KeyValue::new("messaging.operation.type", "process"),
        KeyValue::new("messaging.operation.name", "process"),
        KeyValue::new("messaging.destination.name", ended.queue.to_owned()),
        KeyValue::new("messaging.message.body.size", i64::try_from(ended.body_bytes).unwrap_or(i64::MAX)),
        KeyValue::new("sandpiper.job.id", ended.id.to_owned()),
        KeyValue::new("sandpiper.job.status", status),
        KeyValue::new("sandpiper.job.attempt", i64::from(ended.attempt)),
        KeyValue::new("sandpiper.job.warm", outcome.warm),
    ];
    let id = ended.correlation_id.map(str::to_owned);
    attributes.extend(id.map(|id| KeyValue::new("messaging.message.conversation_id", id)));
    attributes.extend(outcome.exit_code.map(|code| KeyValue::new("process.exit.code", i64::from(code))));
    let builder = tracer
        .span_builder(format!("process {}", ended.queue))
        .with_kind(SpanKind::Consumer)
        .with_start_time(ended.received);
    let failed = outcome.status != job::Status::Succeeded;
    if failed {
        attributes.push(KeyValue::new("error.type", status));
    }
    let mut span = builder.with_attributes(attributes).start_with_context(tracer, &parent);
    if failed {
        span.set_status(Status::error(status));
    }
    let context = parent.with_span(span);
    if let Some(started) = outcome.started_at {
        let parts = [("start", started - outcome.start.unwrap_or_default(), started)];
        let run = outcome.run.map(|run| ("run", started, started + run));
        for (name, from, to) in parts.into_iter().chain(run) {
            tracer
                .span_builder(name)
                .with_start_time(from)
                .start_with_context(tracer, &context)
                .end_with_timestamp(to);
        }
    }
    context
}

/// The headers that a requester's trace comes in.
struct Requester<'a>(&'a EndedJob<'a>);

impl Extractor for Requester<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => self.0.traceparent,
            "tracestate" => self.0.tracestate,
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}
