//! lapin alone, with the envelopes that `src/amqp/frames/filter.rs` makes harmless for the worker. Each of these tests fails on
//! the day on which lapin survives: then that part of the filter can go, see "Remove when" there.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use futures_util::StreamExt;
use lapin::Consumer;

use crate::PATIENCE;
use crate::broker::Node;
use crate::requester::Requester;
use crate::stranger::{CORRELATION_ID, HEADERS, Stranger, large, nested, short};

/// Set where this program is started anew, to end as lapin does: the address, and the queue.
const CONSUME: [&str; 2] = ["SP_TEST_CANARY_URL", "SP_TEST_CANARY_QUEUE"];

/// Properties of a message: flags, and all that they announce.
type Envelope = (u16, Vec<u8>);

/// Whether a message came, rather than the end of the connection.
async fn comes(consumer: &mut Consumer) -> bool {
    let next = tokio::time::timeout(PATIENCE, consumer.next()).await.expect("neither a message nor an end");
    println!("{next:?}");
    next.is_some_and(|delivery| delivery.is_ok_and(|delivery| delivery.data == b"body"))
}

/// Delivers one envelope that lapin can read, and one that it cannot.
async fn the_connection_ends(queue: &str, harmless: Envelope, harmful: Envelope) {
    let node = &Node::shared();
    let mut consumer = Requester::connect(node.url()).await.replies(queue).await;
    let mut stranger = Stranger::connect(node);
    stranger.publish(b"", queue.as_bytes(), harmless, b"body");
    assert!(comes(&mut consumer).await, "lapin does not read what it should");
    stranger.publish(b"", queue.as_bytes(), harmful, b"body");
    assert!(!comes(&mut consumer).await, "lapin survives: that part of src/amqp/frames/filter.rs can go");
}

#[tokio::test(flavor = "multi_thread")]
async fn lapin_ends_a_connection_over_a_word_that_is_not_utf8() {
    let envelope = |word: &[u8]| (CORRELATION_ID, short(word));
    the_connection_ends("canary.words", envelope("é".as_bytes()), envelope(b"\xff")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lapin_ends_a_connection_over_headers_that_are_larger_than_a_frame() {
    // What the broker agrees to is for a whole frame; it takes that much of a publisher for the payload alone.
    let envelope = |payload: usize| (HEADERS, large(payload));
    the_connection_ends("canary.frame", envelope(131_000), envelope(131_072)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lapin_ends_the_process_over_nested_headers() {
    if let [Ok(url), Ok(queue)] = CONSUME.map(std::env::var) {
        let mut consumer = Requester::connect(&url).await.replies(&queue).await;
        println!("listening");
        for number in ["first", "second"] {
            println!("the {number} came: {}", comes(&mut consumer).await);
        }
        return;
    }
    let (node, queue) = (&Node::shared(), "canary.nested");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "canary::lapin_ends_the_process_over_nested_headers"])
        .envs(CONSUME.into_iter().zip([node.url(), queue]))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut says = |wanted: &str| {
        let mut lines = lines.by_ref().inspect(|line| println!("{line}"));
        lines.any(|line| line.contains(wanted))
    };
    assert!(says("listening"));
    let mut stranger = Stranger::connect(node);
    stranger.publish(b"", queue.as_bytes(), (HEADERS, nested(10)), b"body");
    assert!(says("the first came: true"), "lapin does not read what it should");
    stranger.publish(b"", queue.as_bytes(), (HEADERS, nested(20_000)), b"body");
    let survived = says("the second came");
    let ended = child.wait().unwrap();
    println!("{ended}");
    assert!(
        !survived && ended.signal().is_some(),
        "lapin survives: that part of src/amqp/frames/sanitize.rs can go"
    );
}
