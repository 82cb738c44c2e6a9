//! JSON Schema (draft 2020-12) of a job and of a result, made from the types that read and write them.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::output::Chunk;
use super::raw::RawJob;
use super::reply::Reply;

/// The schema of a job, as a publisher writes it.
pub fn job() -> Value {
    of::<RawJob>(SchemaSettings::draft2020_12().for_deserialize())
}

/// The schema of a result, as the worker writes it.
pub fn result() -> Value {
    of::<Reply>(SchemaSettings::draft2020_12().for_serialize())
}

/// The schema of a piece of output, as the worker writes it for a job with `stream`.
pub fn output() -> Value {
    of::<Chunk>(SchemaSettings::draft2020_12().for_serialize())
}

fn of<T: JsonSchema>(settings: SchemaSettings) -> Value {
    settings.into_generator().into_root_schema_for::<T>().to_value()
}
