//! What must hold for any body, and for whatever its publisher says that it is wrapped in.

use proptest::collection::vec;
use proptest::prelude::*;

use super::tests::{gzip, zstd};
use super::*;

/// What a body may have, plain.
const MOST: usize = 2_000;

/// How a publisher may wrap a body.
#[derive(Clone, Copy, Debug)]
enum Wrapping {
    Plain,
    Gzip,
    Zstd,
}

impl Wrapping {
    fn wrap(self, plain: &[u8]) -> Vec<u8> {
        match self {
            Self::Plain => plain.to_vec(),
            Self::Gzip => gzip(plain),
            Self::Zstd => zstd(plain),
        }
    }

    fn encoding(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

fn wrapping() -> impl Strategy<Value = Wrapping> {
    prop::sample::select(&[Wrapping::Plain, Wrapping::Gzip, Wrapping::Zstd][..])
}

/// Data sections of AMQP 1.0 that hold these bytes.
fn sections(bytes: &[u8], size: usize) -> Vec<u8> {
    let section = |part: &[u8]| {
        let length = u32::try_from(part.len()).unwrap().to_be_bytes();
        [&[0, 0x53, 0x75, 0xb0][..], &length, part].concat()
    };
    bytes.chunks(size).flat_map(section).collect()
}

/// Text, and bytes that compress well, badly and to more than a body may have.
fn plain() -> impl Strategy<Value = Vec<u8>> {
    let repeated = (any::<u8>(), 1..3 * MOST).prop_map(|(byte, count)| vec![byte; count]);
    // What begins with a NUL is taken for a section.
    prop_oneof!["[ -~]{1,200}".prop_map(String::into_bytes), vec(any::<u8>(), 1..300), repeated]
        .prop_filter("a section", |plain| plain[0] != 0)
}

fn encoding() -> impl Strategy<Value = String> {
    prop_oneof!["(gzip|zstd|utf-8|identity|GZIP|br)?([:, ]+(gzip|zstd|utf8)?)?", any::<String>()]
}

proptest! {
    #[test]
    fn what_was_wrapped_comes_back_or_is_too_large(
        plain in plain(), wrapping in wrapping(), size in prop::option::of(1..500_usize),
    ) {
        let wrapped = wrapping.wrap(&plain);
        let wrapped = size.map_or(wrapped.clone(), |size| sections(&wrapped, size.max(wrapped.len() / 100)));
        let decoded = decode(&wrapped, Some(wrapping.encoding()), MOST);
        match decoded {
            Ok(decoded) => prop_assert_eq!(&*decoded, &plain[..]),
            Err(undecoded) => {
                prop_assert!(plain.len() > MOST, "{}", undecoded.reason);
                prop_assert_eq!(undecoded.front, &plain[..=MOST]);
            }
        }
    }

    #[test]
    fn what_is_cut_short_is_refused(
        plain in plain(), gzip in any::<bool>(), at in any::<prop::sample::Index>(),
    ) {
        let wrapping = if gzip { Wrapping::Gzip } else { Wrapping::Zstd };
        let wrapped = wrapping.wrap(&plain);
        let cut = &wrapped[..1 + at.index(wrapped.len() - 1)];
        let undecoded = decode(cut, Some(wrapping.encoding()), MOST).unwrap_err();
        prop_assert!(plain.starts_with(&undecoded.front), "{}", undecoded.reason);
    }

    /// Whatever it is, it is not more than a body may have.
    #[test]
    fn what_is_damaged_ends(
        plain in plain(), wrapping in wrapping(), in_sections in any::<bool>(), at in any::<prop::sample::Index>(),
        byte in any::<u8>(), as_named in any::<bool>(), encoding in encoding(),
    ) {
        let mut body = wrapping.wrap(&plain);
        if in_sections {
            body = sections(&body, 100);
        }
        let at = at.index(body.len());
        body[at] = byte;
        let encoding = if as_named { wrapping.encoding() } else { &encoding };
        match decode(&body, Some(encoding), MOST) {
            Ok(decoded) => prop_assert!(decoded.len() <= MOST.max(body.len())),
            Err(undecoded) => {
                prop_assert!(undecoded.front.len() <= MOST + 1);
                prop_assert!(!undecoded.reason.is_empty());
            }
        }
    }

    #[test]
    fn any_bytes_end_as_a_refusal(body in vec(any::<u8>(), 0..300), encoding in encoding()) {
        let admission = Admission { max_body_bytes: MOST, ..Admission::default() };
        let refusal = parse(&body, Some(&encoding), None, &admission).unwrap_err();
        prop_assert!(job::is_id(&refusal.id), "{}", refusal.id);
        prop_assert!(!refusal.reason.is_empty());
    }
}
