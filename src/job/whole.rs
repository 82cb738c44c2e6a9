//! A whole number, however its publisher's language writes it: 2000, 2000.0 and 2e3 are one number to JSON.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, Unexpected, Visitor};

/// A whole number, 0 or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Whole(pub(super) u64);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WholeVisitor;
        impl Visitor<'_> for WholeVisitor {
            type Value = Whole;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("u64")
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<Whole, E> {
                Ok(Whole(value))
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<Whole, E> {
                u64::try_from(value)
                    .map(Whole)
                    .map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))
            }
            fn visit_f64<E: Error>(self, value: f64) -> Result<Whole, E> {
                // Written out it has digits only where it is whole and fits; -0.0 is 0.
                let digits = (value.fract() == 0.0).then(|| (value + 0.0).to_string());
                digits
                    .and_then(|digits| digits.parse().ok())
                    .map(Whole)
                    .ok_or_else(|| E::invalid_type(Unexpected::Float(value), &self))
            }
        }
        deserializer.deserialize_any(WholeVisitor)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn a_whole_number_may_be_written_as_a_float() {
        let read = |text: &str| serde_json::from_str::<Whole>(text).map(|whole| whole.0).ok();
        for (text, number) in [
            ("2000", 2_000),
            ("2000.0", 2_000),
            ("2e3", 2_000),
            ("20000E-1", 2_000),
            ("0", 0),
            ("-0", 0),
            ("-0.0", 0),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(read(text), Some(number), "{text}");
        }
        for text in ["2000.5", "\"2000\"", "-1", "-1.0", "1e20", "18446744073709551616", "true", "[1]"] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
