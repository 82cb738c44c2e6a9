//! What a stranger may write on a message's envelope and lapin cannot read, made harmless before lapin sees it.
//!
//! A broker passes properties on as they are. lapin takes every short string for UTF-8 and gives the connection up
//! where one is not; and it follows nested headers with its stack, so that some tens of kilobytes of brackets end
//! the process. And a broker sends properties in one frame, whatever was agreed on the size of frames, where lapin
//! gives the connection up over a larger one. Each time the message comes again, to the next worker. So frames are
//! looked at as they come in, and changed in place; [`sanitize`] knows how. Bodies pass through unseen, but for those
//! that are larger than the worker reads: these are dropped as they come, and the delivery that lapin sees has none,
//! with a note in [`Dropped`]. The broker itself is trusted: what is not AMQP at all is left for lapin to complain about.
//!
//! # Remove when
//!
//! Each part can go when lapin survives without it; `tests/broker/canary.rs` tries lapin alone and fails on that day.
//! As of lapin 4.12 and amq-protocol 10.6:
//!
//! - Short strings that are not UTF-8 end the connection. The maintainer's word in
//!   <https://github.com/amqp-rs/amq-protocol/issues/28> is that the specification forbids them. It does; RabbitMQ passes
//!   them on all the same, so this is likely to stay.
//! - The parser of headers calls itself for each level of nesting, without a limit, and overflows its stack. No issue
//!   says so yet.
//! - A frame above the agreed size ends the connection, as the specification wants it. RabbitMQ sends a message's
//!   properties in one frame, whatever their size.
//!
//! Dropping bodies that are too large works around nothing: without it, all of a body is in memory before the worker
//! learns of its size. It stays, and with it the reader of frames.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::{AsyncRead, AsyncWrite};

use crate::amqp::frames::oversize::{Dropped, Limit};
use crate::amqp::frames::sanitize;

/// A frame that is looked at is kept until all of it is there. No broker sends larger ones: it would have to be
/// asked for them.
const FRAME_MAX: usize = 16 << 20;

/// How much is read at a time.
const CHUNK: usize = 64 << 10;

/// A table with nothing in it: its length.
const EMPTY: [u8; 4] = [0; 4];

/// Reads whole frames where they have to be looked at, and writes straight through.
#[derive(Debug)]
pub(in crate::amqp) struct FrameFilter<S> {
    stream: S,
    buffer: Vec<u8>,
    /// Up to here the buffer was read by lapin,
    read: usize,
    /// up to here it may be,
    clean: usize,
    /// up to here it has come in,
    filled: usize,
    /// and so many bytes after the clean ones need no look.
    unfiltered_left: usize,
    /// So many bytes after the clean ones are dropped.
    skipping: usize,
    limit: Option<Limit>,
    /// The largest frame that lapin takes.
    largest: usize,
    /// What comes is not AMQP.
    passthrough: bool,
}

impl<S> FrameFilter<S> {
    /// `largest` is what is asked of the broker; it may offer less.
    pub(in crate::amqp) fn new(stream: S, largest: Option<u32>) -> Self {
        let mut this = Self {
            stream,
            buffer: Vec::new(),
            read: 0,
            clean: 0,
            filled: 0,
            unfiltered_left: 0,
            skipping: 0,
            limit: None,
            largest: usize::MAX,
            passthrough: false,
        };
        this.agree_on(largest.unwrap_or(0));
        this
    }

    /// Drops bodies of deliveries that have more bytes than this.
    pub(in crate::amqp) fn limited(mut self, most: usize, dropped: Dropped) -> Self {
        self.limit = Some(Limit::new(most, dropped));
        self
    }

    /// The smaller one counts, of those that are any; and none is smaller than the protocol has it.
    fn agree_on(&mut self, largest: u32) {
        const LEAST: usize = 4_096;
        if largest > 0 {
            let largest = usize::try_from(largest).unwrap_or(usize::MAX);
            self.largest = self.largest.min(largest.max(LEAST));
        }
    }

    /// Takes the headers out of the frame of properties that ends at `end`. Returns where it ends then.
    fn without_headers(&mut self, payload: Range<usize>, end: usize) -> usize {
        let Some(headers) = sanitize::headers(&mut self.buffer[payload.clone()]) else { return end };
        let (from, to) = (payload.start + headers.start, payload.start + headers.end);
        self.buffer.copy_within(to..self.filled, from + EMPTY.len());
        self.buffer[from..from + EMPTY.len()].copy_from_slice(&EMPTY);
        let less = to - from - EMPTY.len();
        self.filled -= less;
        // It fitted into 32 bits before.
        let size = u32::try_from(payload.len() - less).unwrap_or_default();
        self.buffer[payload.start - 4..payload.start].copy_from_slice(&size.to_be_bytes());
        end - less
    }

    /// Makes room at the end, after everything clean was read.
    fn make_room(&mut self) {
        self.buffer.copy_within(self.clean..self.filled, 0);
        (self.read, self.clean, self.filled) = (0, 0, self.filled - self.clean);
        if self.buffer.len() < self.filled + CHUNK {
            self.buffer.resize(self.filled + CHUNK, 0);
        }
    }

    /// Cleans as many frames as are there.
    fn filter_complete_frames(&mut self) {
        /// Type, channel, size; and the mark at the end.
        const AROUND: usize = 1 + 2 + 4 + 1;
        const METHOD: u8 = 1;
        const HEADER: u8 = 2;
        const BODY: u8 = 3;
        const HEARTBEAT: u8 = 8;
        loop {
            if self.passthrough {
                self.clean = self.filled;
                return;
            }
            if self.skipping > 0 {
                let gone = self.skipping.min(self.filled - self.clean);
                self.buffer.copy_within(self.clean + gone..self.filled, self.clean);
                self.filled -= gone;
                self.skipping -= gone;
                if self.skipping > 0 {
                    return;
                }
            }
            let unfiltered_left = self.unfiltered_left.min(self.filled - self.clean);
            self.clean += unfiltered_left;
            self.unfiltered_left -= unfiltered_left;
            let Some([kind, high, low, size @ ..]) = self.buffer[self.clean..self.filled].first_chunk::<7>()
            else {
                return;
            };
            let channel = u16::from_be_bytes([*high, *low]);
            let (kind, size) = (*kind, u32::from_be_bytes(*size));
            let frame = usize::try_from(size).unwrap_or(usize::MAX).saturating_add(AROUND);
            match kind {
                BODY if self.limit.as_mut().is_some_and(|limit| limit.drops(channel, size)) => {
                    self.skipping = frame;
                }
                BODY | HEARTBEAT => self.unfiltered_left = frame,
                METHOD | HEADER if frame <= FRAME_MAX => {
                    let mut end = self.clean + frame;
                    if end > self.filled {
                        return;
                    }
                    let payload = self.clean + AROUND - 1..end - 1;
                    if let Some(limit) = &mut self.limit {
                        let payload = &mut self.buffer[payload.clone()];
                        if kind == METHOD {
                            limit.method(channel, payload)
                        } else {
                            limit.header(channel, payload)
                        }
                    }
                    if kind == HEADER && frame > self.largest {
                        end = self.without_headers(payload, end);
                    }
                    let payload = &mut self.buffer[self.clean + AROUND - 1..end - 1];
                    let offered = if kind == METHOD { sanitize::tuned_frame_max(payload) } else { None };
                    // What cannot be understood here cannot be by lapin; it says so.
                    let _ =
                        if kind == METHOD { sanitize::method(payload) } else { sanitize::header(payload) };
                    self.agree_on(offered.unwrap_or(0));
                    self.clean = end;
                }
                _ => self.passthrough = true,
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for FrameFilter<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        while this.read == this.clean {
            this.make_room();
            let got = Pin::new(&mut this.stream).poll_read(cx, &mut this.buffer[this.filled..]);
            let got = ready!(got)?;
            if got == 0 {
                // Half a frame at the end is nothing that lapin would read.
                return Poll::Ready(Ok(0));
            }
            this.filled += got;
            this.filter_complete_frames();
        }
        let part = &this.buffer[this.read..this.clean];
        let part = &part[..part.len().min(into.len())];
        into[..part.len()].copy_from_slice(part);
        this.read += part.len();
        Poll::Ready(Ok(part.len()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FrameFilter<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, parts)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_close(cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod properties;

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use crate::amqp::frames::sanitize::DEPTH;
    use futures_util::AsyncReadExt;
    use futures_util::io::Cursor;

    fn short(text: &[u8]) -> Vec<u8> {
        [&[u8::try_from(text.len()).unwrap()], text].concat()
    }

    fn long(bytes: &[u8]) -> Vec<u8> {
        [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
    }

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        [&[kind, 0, 1], &long(payload)[..], &[0xce]].concat()
    }

    fn properties(flags: u16, values: &[u8]) -> Vec<u8> {
        frame(2, &[&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9], &flags.to_be_bytes()[..], values].concat())
    }

    /// What comes out where `bytes` come in, read in parts of every size.
    async fn filtered(bytes: &[u8]) -> Vec<u8> {
        let mut whole = Vec::new();
        FrameFilter::new(Cursor::new(bytes), None).read_to_end(&mut whole).await.unwrap();
        for size in 1..40 {
            let (mut parts, mut filter) = (Vec::new(), FrameFilter::new(Bits(bytes, size), None));
            filter.read_to_end(&mut parts).await.unwrap();
            assert!(parts == whole, "read {size} bytes at a time");
        }
        whole
    }

    /// A stream that gives so many bytes at a time.
    struct Bits<'a>(&'a [u8], usize);

    impl AsyncRead for Bits<'_> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            into: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            let count = self.1.min(self.0.len()).min(into.len());
            let (now, later) = self.0.split_at(count);
            into[..count].copy_from_slice(now);
            self.0 = later;
            Poll::Ready(Ok(count))
        }
    }

    #[tokio::test]
    async fn what_is_in_order_passes_unchanged() {
        let field = [short("clé".as_bytes()), vec![b'S'], long(b"\xff\xfe")].concat();
        let all = [
            frame(1, &[&[0, 60, 0, 60][..], &short(b"tag"), &[0; 9], &short(b""), &short(b"jobs")].concat()),
            properties(1 << 13 | 1 << 10, &[long(&field), short("ünï".as_bytes())].concat()),
            frame(3, b"\xff\xfe\x01\x02 whatever"),
            frame(8, b""),
        ]
        .concat();
        assert_eq!(filtered(&all).await, all);
        // Another protocol altogether, whatever it looks like later on.
        let strange = [b"HTTP/1.1 400 no\r\n", &properties(1 << 10, &short(b"\xff"))[..]].concat();
        assert_eq!(filtered(&strange).await, strange);
    }

    #[tokio::test]
    async fn a_body_that_is_too_large_does_not_come_through() {
        let deliver = |number: u64| {
            let number = number.to_be_bytes();
            frame(
                1,
                &[&[0, 60, 0, 60][..], &short(b"tag"), &number, &[0], &short(b""), &short(b"jobs")].concat(),
            )
        };
        let header = |size: u64| {
            let id = short(b"id");
            frame(2, &[&[0, 60, 0, 0][..], &size.to_be_bytes(), &(1_u16 << 7).to_be_bytes(), &id].concat())
        };
        let get = frame(1, &[&[0, 60, 0, 71][..], &[0; 9], &short(b""), &short(b"jobs"), &[0; 4]].concat());
        let body = |size: usize| frame(3, &vec![b'x'; size]);
        let come = [
            deliver(1),
            header(10),
            body(10),
            deliver(2),
            header(11),
            body(7),
            frame(8, b""),
            body(4),
            deliver(3),
            header(0),
            deliver(4),
            header(100_000),
            body(60_000),
            body(40_000),
            // What was asked for one by one is looked at by whoever asked.
            get.clone(),
            header(11),
            body(11),
            deliver(5),
            header(1),
            body(1),
        ];
        let goes = [
            deliver(1),
            header(10),
            body(10),
            deliver(2),
            header(0),
            frame(8, b""),
            deliver(3),
            header(0),
            deliver(4),
            header(0),
            get,
            header(11),
            body(11),
            deliver(5),
            header(1),
            body(1),
        ];
        let (come, goes) = (come.concat(), goes.concat());
        for size in [1, 2, 3, 7, 39, 64, 1_000, 65_536, usize::MAX] {
            let dropped = Dropped::default();
            let (mut out, stream) = (Vec::new(), FrameFilter::new(Bits(&come, size), None));
            stream.limited(10, dropped.clone()).read_to_end(&mut out).await.unwrap();
            assert!(out == goes, "read {size} bytes at a time");
            assert_eq!((dropped.take(1, 2), dropped.take(1, 4)), (Some(11), Some(100_000)));
            assert_eq!((dropped.take(1, 2), dropped.take(1, 1), dropped.take(2, 4)), (None, None, None));
        }
    }

    #[tokio::test]
    async fn headers_that_do_not_fit_the_agreed_frame_are_taken_out() {
        let tune = |largest: u32| {
            frame(1, &[&[0, 10, 0, 30, 7, 255][..], &largest.to_be_bytes(), &[0, 60]].concat())
        };
        let message = |headers: &[u8]| {
            let values = [short(b"text/plain"), long(headers), short(b"id")].concat();
            [properties(1 << 15 | 1 << 13 | 1 << 7, &values), frame(3, b"body")].concat()
        };
        let field = |size: usize| [short(b"name"), vec![b'S'], long(&vec![b'x'; size])].concat();
        // Around it: two short strings, and what the frame needs besides the one header.
        let fits = 5_000 - (11 + 3) - (8 + 14) - 4 - (5 + 1 + 4);
        for (size, headers) in [(fits, field(fits)), (fits + 1, Vec::new()), (60_000, Vec::new())] {
            let come = [tune(5_000), message(&field(size)), message(b"")].concat();
            let goes = [tune(5_000), message(&headers), message(b"")].concat();
            assert!(filtered(&come).await == goes, "{size}");
        }
        let unlimited = [tune(0), message(&field(60_000))].concat();
        assert_eq!(filtered(&unlimited).await, unlimited);
    }

    #[tokio::test]
    async fn every_word_of_a_stranger_becomes_text() {
        let bad = |text: &[u8]| [short(text), short(b"\xe2\x82"), short(b"b\xffd")].concat();
        let good = |text: &[u8]| [short(text), short(b"\x1a\x1a"), short(b"b\x1ad")].concat();
        for (before, id) in [(&[0, 60, 0, 50, 1, 56][..], b"no"), (&[0, 60, 0, 60], b"me")] {
            let gap = if id == b"me" { 9 } else { 0 };
            let method = |words: Vec<u8>| {
                let (first, rest) = words.split_at(3);
                frame(1, &[before, first, &vec![0xff; gap], rest].concat())
            };
            assert_eq!(filtered(&method(bad(id))).await, method(good(id)));
        }
        // Every property that is a short string, one after the other.
        for property in [0_u16, 1, 5, 6, 7, 8, 10, 11, 12, 13] {
            let all = |text: &[u8]| properties(0x8000 >> property, &short(text));
            assert_eq!(filtered(&all(b"\xffabc\xc3")).await, all(b"\x1aabc\x1a"), "{property}");
        }
        let fields = |name: &[u8]| {
            let inner = [short(name), vec![b'I', 0, 0, 0, 1], short(name), vec![b'V']].concat();
            let table = [short(name), vec![b'F'], long(&inner), short(name), vec![b't', 1]].concat();
            properties(1 << 13 | 1 << 12 | 1 << 6, &[long(&table), vec![2], vec![0xff; 8]].concat())
        };
        assert_eq!(filtered(&fields(b"n\x80")).await, fields(b"n\x1a"));
    }

    #[tokio::test]
    async fn what_is_nested_too_deep_becomes_bytes() {
        let nested =
            |depth: usize| (0..depth).fold(vec![b'V'], |inner, _| [vec![b'A'], long(&inner)].concat());
        let headers = |value: &[u8]| properties(1 << 13, &long(&[&short(b"deep"), value].concat()));
        assert_eq!(filtered(&headers(&nested(DEPTH))).await, headers(&nested(DEPTH)));
        let hostile = headers(&nested(200));
        let clean = filtered(&hostile).await;
        let changed: Vec<usize> = (0..clean.len()).filter(|at| clean[*at] != hostile[*at]).collect();
        // One tag, so many levels below the first.
        let first = hostile.iter().position(|byte| *byte == b'A').unwrap();
        assert_eq!(changed, [first + 5 * DEPTH]);
        assert_eq!(clean[changed[0]], b'x');
    }
}
