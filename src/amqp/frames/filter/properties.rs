//! What must hold for any frames, of strangers or of a broker that has lost its way. What can be read is what
//! amq-protocol can: lapin reads with nothing else.

use amq_protocol::frame::{AMQPFrame, parse_frame};
use amq_protocol::types::AMQPValue;
use futures_util::{AsyncReadExt, FutureExt};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::amqp::frames::sanitize::DEPTH;

/// A stream that gives as many bytes at a time as its second part says, from the start again after the last.
struct Pieces<'a>(&'a [u8], std::iter::Cycle<std::slice::Iter<'a, usize>>);

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let count = self.1.next().map_or(usize::MAX, |size| *size).min(self.0.len()).min(into.len());
        let (now, later) = self.0.split_at(count);
        into[..count].copy_from_slice(now);
        self.0 = later;
        Poll::Ready(Ok(count))
    }
}

/// How a filter is set.
#[derive(Clone, Copy, Debug)]
struct Settings {
    largest: Option<u32>,
    most: Option<usize>,
}

const UNLIMITED: Settings = Settings { largest: None, most: None };

/// What comes out, and that no more is kept than came in.
fn filtered(bytes: &[u8], sizes: &[usize], settings: Settings) -> Vec<u8> {
    let mut filter = FrameFilter::new(Pieces(bytes, sizes.iter().cycle()), settings.largest);
    if let Some(most) = settings.most {
        filter = filter.limited(most, Dropped::default());
    }
    let mut out = Vec::new();
    filter.read_to_end(&mut out).now_or_never().expect("every read is ready").unwrap();
    assert!(filter.buffer.len() <= bytes.len() + 2 * CHUNK, "{} bytes are kept", filter.buffer.len());
    assert!(out.len() <= bytes.len());
    out
}

/// Every frame in it, and what is left at the end.
fn read(mut bytes: &[u8]) -> (Vec<AMQPFrame>, &[u8]) {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let Ok((rest, frame)) = parse_frame(bytes) else { break };
        frames.push(frame);
        bytes = rest;
    }
    (frames, bytes)
}

fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    [&[kind][..], &channel.to_be_bytes(), &long(payload), &[0xce]].concat()
}

/// Lists in lists, so many, around a value.
fn nested(depth: usize, value: Vec<u8>) -> Vec<u8> {
    (0..depth).fold(value, |inner, _| [vec![b'A'], long(&inner)].concat())
}

/// A short string: text, or what a stranger writes.
fn short(hostile: bool) -> BoxedStrategy<Vec<u8>> {
    let text = ".{0,12}".prop_map(String::into_bytes);
    let bytes = if hostile { prop_oneof![text, vec(any::<u8>(), 0..=255)].boxed() } else { text.boxed() };
    bytes.prop_map(|bytes| [&[u8::try_from(bytes.len()).unwrap()], &bytes[..]].concat()).boxed()
}

/// A value with its type; of strangers, nested as deep as they like.
fn value(hostile: bool) -> BoxedStrategy<Vec<u8>> {
    let number = |kinds: &'static [u8], size: usize| {
        (prop::sample::select(kinds), vec(any::<u8>(), size))
            .prop_map(|(kind, value)| [&[kind], &value[..]].concat())
    };
    let bytes = (prop::sample::select(&b"Sx"[..]), vec(any::<u8>(), 0..30));
    let leaf = prop_oneof![
        Just(vec![b'V']),
        number(b"tbB", 1),
        number(b"sUu", 2),
        number(b"Iif", 4),
        number(b"D", 5),
        number(b"LldT", 8),
        bytes.prop_map(|(kind, bytes)| [vec![kind], long(&bytes)].concat()),
    ];
    // With the levels of the tree below never deeper than what is left as it is.
    let deep = if hostile { 0..6 * DEPTH } else { 0..DEPTH - 4 };
    let tree = leaf.prop_recursive(3, 12, 3, move |inner| {
        let field = (short(hostile), inner.clone()).prop_map(|(name, value)| [name, value].concat());
        prop_oneof![
            vec(inner, 0..3).prop_map(|values| [vec![b'A'], long(&values.concat())].concat()),
            vec(field, 0..3).prop_map(|fields| [vec![b'F'], long(&fields.concat())].concat()),
        ]
    });
    (deep, tree).prop_map(|(depth, value)| nested(depth, value)).boxed()
}

/// The payload of a header frame, with any of the properties.
fn header(hostile: bool) -> BoxedStrategy<Vec<u8>> {
    let field = (short(hostile), value(hostile)).prop_map(|(name, value)| [name, value].concat());
    let headers = vec(field, 0..4).prop_map(|fields| long(&fields.concat()));
    // Some have more of them than the frame may have that was agreed on.
    let sizes = if hostile { 3_000..6_000_usize } else { 0..1_000 };
    let large = sizes.prop_map(|size| long(&[&[1, b'n', b'S'][..], &long(&vec![b'x'; size])].concat()));
    let headers = prop_oneof![2 => headers, 1 => large];
    (any::<u64>(), 0..1_u16 << 14, headers, vec(short(hostile), 14), vec(any::<u8>(), 8))
        .prop_map(|(size, flags, headers, words, numbers)| {
            let size = (size % 100).to_be_bytes();
            let mut payload = [&[0, 60, 0, 0][..], &size, &(flags << 2).to_be_bytes()].concat();
            for property in (0..14).filter(|property| (flags << 2) & (0x8000 >> property) != 0) {
                payload.extend(match property {
                    2 => &headers[..],
                    3 | 4 => &numbers[..1],
                    9 => &numbers,
                    _ => &words[property],
                });
            }
            payload
        })
        .boxed()
}

/// A frame as a broker sends them.
fn any_frame(hostile: bool) -> BoxedStrategy<Vec<u8>> {
    let method =
        (0..6_usize, vec(short(hostile), 3), vec(any::<u8>(), 9)).prop_map(|(which, words, numbers)| {
            let [one, two, three] = [0, 1, 2].map(|at| &words[at][..]);
            match which {
                0 => [&[0, 10, 0, 50][..], &numbers[..2], one, &numbers[..4]].concat(),
                1 => [&[0, 20, 0, 40][..], &numbers[..2], one, &numbers[..4]].concat(),
                2 => [&[0, 60, 0, 50][..], &numbers[..2], one, two, three].concat(),
                3 => [&[0, 60, 0, 60][..], one, &numbers[..8], &[numbers[8] & 1], two, three].concat(),
                4 => {
                    [&[0, 60, 0, 71][..], &numbers[..8], &[numbers[8] & 1], one, two, &numbers[..4]].concat()
                }
                // What may make frames smaller than some of those here; never below what the protocol guarantees.
                _ => [&[0, 10, 0, 30][..], &numbers[..2], &[0, 0], &numbers[2..6]].concat(),
            }
        });
    let channel = 0..3_u16;
    prop_oneof![
        (channel.clone(), method).prop_map(|(channel, payload)| frame(1, channel, &payload)),
        (channel.clone(), header(hostile)).prop_map(|(channel, payload)| frame(2, channel, &payload)),
        (channel, vec(any::<u8>(), 0..60)).prop_map(|(channel, payload)| frame(3, channel, &payload)),
        Just(frame(8, 0, b"")),
    ]
    .boxed()
}

/// Frames, and deliveries whole, which a filter may have to leave without their body.
fn any_frames(hostile: bool) -> BoxedStrategy<Vec<Vec<u8>>> {
    let body = vec(any::<u8>(), 1..60);
    let delivery =
        (0..3_u16, short(hostile), header(hostile), body).prop_map(|(channel, word, mut header, body)| {
            let method = [&[0, 60, 0, 60][..], &word, &[0; 9], &word, &word].concat();
            header[4..12].copy_from_slice(&u64::try_from(body.len()).unwrap().to_be_bytes());
            vec![frame(1, channel, &method), frame(2, channel, &header), frame(3, channel, &body)]
        });
    let some = prop_oneof![any_frame(hostile).prop_map(|frame| vec![frame]), delivery];
    vec(some, 0..5).prop_map(|frames| frames.concat()).boxed()
}

/// How deep a value is nested.
fn depth(value: &AMQPValue) -> usize {
    match value {
        AMQPValue::FieldTable(table) => 1 + table.inner().values().map(depth).max().unwrap_or(0),
        AMQPValue::FieldArray(array) => 1 + array.as_slice().iter().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// So many bytes at a time.
fn sizes() -> impl Strategy<Value = Vec<usize>> {
    vec(prop_oneof![1..9_usize, 1..3_000_usize], 1..6)
}

fn settings() -> impl Strategy<Value = Settings> {
    (prop::option::of(0..6_000_u32), prop::option::of(0..80_usize))
        .prop_map(|(largest, most)| Settings { largest, most })
}

/// Frames of which one byte was changed, one left out or one put in; or which are none at all.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let damage = (any_frames(true), any::<prop::sample::Index>(), any::<u8>(), 0..3_u8);
    prop_oneof![
        4 => damage.prop_map(|(frames, at, byte, how)| {
            // One byte at least.
            let mut bytes = [frames.concat(), vec![8]].concat();
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = byte,
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, byte),
            }
            bytes
        }),
        1 => vec(any::<u8>(), 0..200),
    ]
}

proptest! {
    #[test]
    fn frames_in_order_pass_unchanged(frames in any_frames(false), sizes in sizes()) {
        let all = frames.concat();
        prop_assert_eq!(read(&all).0.len(), frames.len(), "these are none");
        prop_assert!(filtered(&all, &sizes, UNLIMITED) == all);
    }

    #[test]
    fn whatever_strangers_write_can_be_read(frames in any_frames(true), sizes in sizes(), settings in settings()) {
        let all = frames.concat();
        let out = filtered(&all, &sizes, settings);
        let (read, rest) = read(&out);
        prop_assert!(rest.is_empty(), "{rest:?}");
        let bodies = |frames: &[AMQPFrame]| frames.iter().filter(|frame| matches!(frame, AMQPFrame::Body(..))).count();
        let dropped = frames.iter().filter(|frame| frame[0] == 3).count() - bodies(&read);
        prop_assert_eq!(read.len() + dropped, frames.len());
        prop_assert!(settings.most.is_some() || dropped == 0);
        let headers = read.iter().filter_map(|frame| match frame {
            AMQPFrame::Header(_, header) => header.properties.headers().as_ref(),
            _ => None,
        });
        let deepest = headers.flat_map(|headers| headers.inner().values()).map(depth).max();
        prop_assert!(deepest <= Some(DEPTH), "{deepest:?} levels");
    }

    #[test]
    fn pieces_make_no_difference(bytes in damaged(), sizes in sizes(), settings in settings()) {
        prop_assert!(filtered(&bytes, &sizes, settings) == filtered(&bytes, &[], settings));
    }

    /// What the filter does not follow to its end is for lapin to refuse, and lapin must: what it went on to read
    /// there, nobody would have looked at.
    #[test]
    fn what_is_not_understood_cannot_be_read(
        payload in header(true), at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>(),
    ) {
        let mut payload = payload;
        prop_assert!(sanitize::header(&mut payload.clone()).is_some(), "nothing is wrong with it");
        let at = at.index(payload.len());
        if cut { payload.truncate(at) } else { payload[at] = byte }
        let before = payload.len();
        let understood = sanitize::header(&mut payload);
        prop_assert_eq!(payload.len(), before);
        if understood.is_none() {
            prop_assert!(parse_frame(&frame(2, 1, &payload)[..]).is_err());
        }
        // What was made harmless stays as it is.
        let once = payload.clone();
        sanitize::header(&mut payload);
        prop_assert_eq!(payload, once);
    }
}
