//! Bodies that do not hold their JSON plainly: compressed, as the property `content_encoding` says, or as a section of
//! AMQP 1.0. No more is decoded than a body may have, whatever is claimed of it.

use std::borrow::Cow;
use std::io::Read;

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use crate::job::explain::quote;
use crate::job::{self, Admission, Job, Refusal, RefusalKind};

/// Frames of zstd in one body. One is usual; each costs its start, whatever it holds.
const FRAMES_MAX: usize = 64;
/// The window that every decoder of zstd should support, by RFC 8878.
const WINDOW_MIN: u64 = 8 << 20;
/// Sections of AMQP 1.0 in one body.
const SECTIONS_MAX: usize = 1_024;

/// Reads and checks the job in a message body, whatever it is wrapped in.
pub(super) fn parse(
    body: &[u8],
    encoding: Option<&str>,
    message_id: Option<&str>,
    admission: &Admission,
) -> Result<Job, Refusal> {
    let most = admission.max_body_bytes;
    if body.len() > most {
        return job::parse(body, message_id, admission);
    }
    match decode(body, encoding, most) {
        Ok(body) => job::parse(&body, message_id, admission),
        Err(Undecoded { kind, reason, front }) => {
            // Where nothing was decoded, it may be plain all the same.
            let known = if front.is_empty() { body } else { &front };
            Err(Refusal::new(known, message_id, kind, reason))
        }
    }
}

/// Why there is no plain body.
#[derive(Debug)]
struct Undecoded {
    kind: RefusalKind,
    reason: String,
    /// What was decoded: its job's id may stand there.
    front: Vec<u8>,
}

impl Undecoded {
    fn malformed(reason: impl Into<String>) -> Self {
        Self { kind: RefusalKind::Malformed, reason: reason.into(), front: Vec::new() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstd,
}

impl Compression {
    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

/// The JSON of a body, at most `most` bytes.
fn decode<'a>(body: &'a [u8], encoding: Option<&str>, most: usize) -> Result<Cow<'a, [u8]>, Undecoded> {
    let compression = compression(encoding.unwrap_or_default())?;
    let body = section(body)?;
    match compression {
        Some(compression) if !body.is_empty() => decompress(&body, compression, most).map(Cow::Owned),
        _ => Ok(body),
    }
}

/// What `content_encoding` names: nothing, a character encoding, as some libraries write there, a compression, or
/// both, as in `gzip:UTF-8`.
fn compression(encoding: &str) -> Result<Option<Compression>, Undecoded> {
    let mut compression = None;
    for part in encoding.split([':', ',']) {
        let named = match part.trim().to_ascii_lowercase().as_str() {
            "" | "identity" | "binary" | "utf-8" | "utf8" | "us-ascii" | "ascii" => continue,
            "gzip" | "x-gzip" | "application/gzip" | "application/x-gzip" => Compression::Gzip,
            "zstd" | "application/zstd" => Compression::Zstd,
            _ => {
                return Err(Undecoded::malformed(format!(
                    "`content_encoding` is {}, which this worker does not know; send UTF-8, plain or compressed \
                     with gzip or zstd",
                    quote(encoding)
                )));
            }
        };
        if compression.replace(named).is_some() {
            return Err(Undecoded::malformed(format!(
                "`content_encoding` is {}; compress a body once",
                quote(encoding)
            )));
        }
    }
    Ok(compression)
}

fn decompress(body: &[u8], compression: Compression, most: usize) -> Result<Vec<u8>, Undecoded> {
    let mut plain = Vec::new();
    let read = match compression {
        Compression::Gzip => gunzip(body, most, &mut plain),
        Compression::Zstd => unzstd(body, most, &mut plain),
    };
    if plain.len() > most {
        return Err(Undecoded {
            kind: RefusalKind::Unacceptable,
            reason: format!("the body has more than {most} bytes decompressed, this worker's maximum"),
            front: plain,
        });
    }
    match read {
        Ok(()) => Ok(plain),
        Err(why) => Err(Undecoded {
            kind: RefusalKind::Malformed,
            reason: format!(
                "the body is not {}, as `content_encoding` says: {why}; compress it so, or leave the property out",
                compression.name()
            ),
            front: plain,
        }),
    }
}

/// One byte more than `most` tells that there is more.
fn up_to(most: usize, have: usize) -> u64 {
    u64::try_from(most.saturating_add(1).saturating_sub(have)).unwrap_or(u64::MAX)
}

fn gunzip(body: &[u8], most: usize, plain: &mut Vec<u8>) -> Result<(), String> {
    MultiGzDecoder::new(body).take(up_to(most, 0)).read_to_end(plain).map_err(|error| error.to_string())?;
    Ok(())
}

fn unzstd(mut body: &[u8], most: usize, plain: &mut Vec<u8>) -> Result<(), String> {
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(u64::try_from(most).unwrap_or(u64::MAX).max(WINDOW_MIN));
    for _ in 0..FRAMES_MAX {
        match StreamingDecoder::new_with_decoder(&mut body, &mut decoder) {
            Ok(frame) => {
                frame.take(up_to(most, plain.len())).read_to_end(plain).map_err(|error| error.to_string())?;
            }
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                length, ..
            })) => {
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                body = body.get(length..).ok_or("it is cut short")?;
            }
            Err(error) => return Err(error.to_string()),
        }
        if body.is_empty() || plain.len() > most {
            return Ok(());
        }
    }
    Err(format!("it has more than {FRAMES_MAX} frames"))
}

/// What a body is a section of, by the descriptor that it begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    Data,
    Value,
    Other,
}

/// The content of a message that was published by AMQP 1.0. The broker hands a data section on plainly, and any other
/// as it is written, which no JSON is: it begins with a NUL.
fn section(body: &[u8]) -> Result<Cow<'_, [u8]>, Undecoded> {
    if body.first() != Some(&0) || !matches!(body.get(1), Some(0x53 | 0x80)) {
        return Ok(Cow::Borrowed(body));
    }
    let refused = || {
        Undecoded::malformed(
            "the body is a section of AMQP 1.0 that holds no text; send the job as one data section, or as an \
             amqp-value section with a string or binary",
        )
    };
    let mut rest = body;
    let mut content: Vec<&[u8]> = Vec::new();
    while !rest.is_empty() {
        let (section, after) = descriptor(rest).ok_or_else(refused)?;
        let (text, after) = text(after).ok_or_else(refused)?;
        if section == Section::Other
            || (section == Section::Value && !(content.is_empty() && after.is_empty()))
            || content.len() == SECTIONS_MAX
        {
            return Err(refused());
        }
        content.push(text);
        rest = after;
    }
    Ok(match content.as_slice() {
        [one] => Cow::Borrowed(one),
        many => Cow::Owned(many.concat()),
    })
}

/// The kind of the section that begins here, and what follows its descriptor.
fn descriptor(bytes: &[u8]) -> Option<(Section, &[u8])> {
    let (code, rest) = match bytes {
        [0, 0x53, code, rest @ ..] => (u64::from(*code), rest),
        [0, 0x80, rest @ ..] => {
            let (code, rest) = rest.split_first_chunk()?;
            (u64::from_be_bytes(*code), rest)
        }
        _ => return None,
    };
    let section = match code {
        0x75 => Section::Data,
        0x77 => Section::Value,
        _ => Section::Other,
    };
    Some((section, rest))
}

/// A string or binary of AMQP 1.0, and what follows it.
fn text(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = match bytes {
        [0xa0 | 0xa1, length, rest @ ..] => (usize::from(*length), rest),
        [0xb0 | 0xb1, rest @ ..] => {
            let (length, rest) = rest.split_first_chunk()?;
            (usize::try_from(u32::from_be_bytes(*length)).ok()?, rest)
        }
        _ => return None,
    };
    rest.split_at_checked(length)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod properties;

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use std::io::Write;

    use flate2::Compression as Level;
    use flate2::write::GzEncoder;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    const JOB: &[u8] = br#"{"id": "a", "code": "print(1)"}"#;

    pub(super) fn gzip(plain: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Level::best());
        encoder.write_all(plain).unwrap();
        encoder.finish().unwrap()
    }

    pub(super) fn zstd(plain: &[u8]) -> Vec<u8> {
        compress_to_vec(plain, CompressionLevel::Fastest)
    }

    #[test]
    fn what_the_property_names_is_undone() {
        let both = [gzip(&JOB[..9]), gzip(&JOB[9..])].concat();
        let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3][..], &zstd(JOB)].concat();
        for (body, encoding) in [
            (JOB.to_vec(), ""),
            (JOB.to_vec(), "UTF-8"),
            (JOB.to_vec(), "binary"),
            (gzip(JOB), "gzip"),
            (gzip(JOB), "GZip:UTF-8"),
            (gzip(JOB), "utf-8, x-gzip"),
            (both, "gzip"),
            (zstd(JOB), "zstd"),
            ([zstd(&JOB[..9]), zstd(&JOB[9..])].concat(), "zstd"),
            (skipped, "zstd"),
        ] {
            assert_eq!(&*decode(&body, Some(encoding), JOB.len()).unwrap(), JOB, "{encoding}");
        }
        assert_eq!(&*decode(JOB, None, 1).unwrap(), JOB);
        assert_eq!(&*decode(b"", Some("gzip"), 1).unwrap(), b"");
    }

    #[test]
    fn a_compressed_job_is_read_or_refused_by_its_name() {
        let admission = Admission { max_body_bytes: 1_000, ..Admission::default() };
        let body = gzip(JOB);
        assert_eq!(parse(&body, Some("gzip"), None, &admission).unwrap().id, "a");
        let refusal = parse(&body, Some("br"), Some("m"), &admission).unwrap_err();
        assert_eq!((refusal.id.as_str(), refusal.kind), ("m", RefusalKind::Malformed));
        assert_eq!(parse(JOB, Some("utf-16"), Some("m"), &admission).unwrap_err().id, "a");
        let bomb = gzip(&[JOB, &[b' '; 1_000]].concat());
        let refusal = parse(&bomb, Some("gzip"), Some("m"), &admission).unwrap_err();
        assert_eq!((refusal.id.as_str(), refusal.kind), ("a", RefusalKind::Unacceptable));
        let large = parse(&[0; 1_001], Some("gzip"), Some("m"), &admission).unwrap_err();
        assert!(large.reason.starts_with("the body has 1001 bytes"), "{}", large.reason);
    }

    #[test]
    fn what_cannot_be_undone_is_told() {
        let mut cut = gzip(JOB);
        cut.truncate(20);
        let many = zstd(b"").repeat(FRAMES_MAX + 1);
        for (body, encoding, told) in [
            (JOB, "br", "`content_encoding` is `br`, which this worker does not know"),
            (JOB, "deflate", "`content_encoding` is `deflate`"),
            (JOB, "utf-16", "`content_encoding` is `utf-16`"),
            (JOB, "gzip, zstd", "compress a body once"),
            (JOB, "gzip", "the body is not gzip, as `content_encoding` says: "),
            (JOB, "zstd", "the body is not zstd, as `content_encoding` says: "),
            (&cut, "gzip", "the body is not gzip, as `content_encoding` says: "),
            (&many, "zstd", "it has more than 64 frames"),
        ] {
            let undecoded = decode(body, Some(encoding), 1_000).unwrap_err();
            assert!(undecoded.reason.contains(told), "{}", undecoded.reason);
            assert_eq!(undecoded.kind, RefusalKind::Malformed);
        }
    }

    /// Nothing is decoded past the maximum, and the job that it would have been is still known.
    #[test]
    fn a_bomb_goes_no_further_than_the_maximum() {
        let most = 8 << 10;
        let bomb = [JOB, &vec![b' '; 4 << 20]].concat();
        // A window of 3.75 TiB, and one that would be just too large.
        let window = |descriptor: u8| [&[0x28, 0xb5, 0x2f, 0xfd, 0, descriptor][..], &[0x55; 64]].concat();
        for (body, encoding) in [(gzip(&bomb), "gzip"), (zstd(&bomb), "zstd")] {
            assert!(body.len() < most, "{}", body.len());
            let undecoded = decode(&body, Some(encoding), most).unwrap_err();
            assert_eq!(
                undecoded.reason,
                "the body has more than 8192 bytes decompressed, this worker's maximum"
            );
            assert_eq!((undecoded.kind, undecoded.front.len()), (RefusalKind::Unacceptable, most + 1));
            assert!(undecoded.front.starts_with(JOB));
        }
        for descriptor in [0xff, 14 << 3] {
            let undecoded = decode(&window(descriptor), Some("zstd"), most).unwrap_err();
            assert!(
                undecoded.reason.contains("WindowTooBig") || undecoded.reason.contains("window_size"),
                "{}",
                undecoded.reason
            );
        }
    }

    #[test]
    fn a_section_of_amqp_1_0_is_its_content() {
        let length = u32::try_from(JOB.len()).unwrap().to_be_bytes();
        let short = [&[0xa1, 31][..], JOB].concat();
        let long = [&[0xb0][..], &length, JOB].concat();
        let of = |descriptor: &[u8], content: &[u8]| [descriptor, content].concat();
        let half =
            |from: &[u8]| [&[0, 0x53, 0x75, 0xa0, u8::try_from(from.len()).unwrap()][..], from].concat();
        for body in [
            of(&[0, 0x53, 0x77], &short),
            of(&[0, 0x53, 0x77], &long),
            of(&[0, 0x53, 0x75], &long),
            of(&[0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0x77], &short),
            [half(&JOB[..9]), half(&JOB[9..])].concat(),
        ] {
            assert_eq!(&*decode(&body, None, 1_000).unwrap(), JOB, "{body:?}");
        }
        let packed = gzip(JOB);
        let packed = [&[0, 0x53, 0x75, 0xa0, u8::try_from(packed.len()).unwrap()][..], &packed].concat();
        assert_eq!(&*decode(&packed, Some("gzip"), 1_000).unwrap(), JOB);
        for body in [
            of(&[0, 0x53, 0x77], &[0x54, 7]),
            of(&[0, 0x53, 0x76], &short),
            of(&[0, 0x53, 0x77], &short[..9]),
            of(&[0, 0x53, 0x77], &short).repeat(2),
            of(&[0, 0x53, 0x77], &[0xb1, 0xff, 0xff, 0xff, 0xff]),
            vec![0, 0x53],
            vec![0, 0x80, 1],
        ] {
            let undecoded = decode(&body, None, 1_000).unwrap_err();
            assert!(undecoded.reason.contains("AMQP 1.0"), "{}", undecoded.reason);
        }
    }
}
