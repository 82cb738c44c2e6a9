//! A publisher that speaks AMQP 1.0, as RabbitMQ 4 understands without a plugin: as much of it as one message takes.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::PATIENCE;
use crate::broker::Node;

/// What a frame carries, by the numbers of the specification.
const OPEN: u8 = 0x10;
const BEGIN: u8 = 0x11;
const ATTACH: u8 = 0x12;
const FLOW: u8 = 0x13;
const TRANSFER: u8 = 0x14;
const DISPOSITION: u8 = 0x15;
const CLOSE: u8 = 0x18;
const SASL_MECHANISMS: u8 = 0x40;
const SASL_INIT: u8 = 0x41;
const SASL_OUTCOME: u8 = 0x44;
const SOURCE: u8 = 0x28;
const TARGET: u8 = 0x29;
const PROPERTIES: u8 = 0x73;
const DATA: u8 = 0x75;

const NULL: [u8; 1] = [0x40];
const FALSE: [u8; 1] = [0x42];
const BINARY: u8 = 0xb0;
const STRING: u8 = 0xb1;
const SYMBOL: u8 = 0xb3;

fn number(value: u8) -> Vec<u8> {
    vec![0x52, value]
}

fn bytes(kind: u8, value: &[u8]) -> Vec<u8> {
    [&[kind][..], &u32::try_from(value.len()).unwrap().to_be_bytes(), value].concat()
}

fn described(code: u8, fields: &[Vec<u8>]) -> Vec<u8> {
    let content = [&u32::try_from(fields.len()).unwrap().to_be_bytes()[..], &fields.concat()].concat();
    [&[0, 0x53, code][..], &bytes(0xd0, &content)].concat()
}

struct Publisher(TcpStream);

impl Publisher {
    fn greet(&mut self, header: &[u8; 8]) {
        self.0.write_all(header).unwrap();
        let mut answer = [0; 8];
        self.0.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, header);
    }

    fn send(&mut self, sasl: bool, body: &[u8]) {
        let length = u32::try_from(body.len() + 8).unwrap().to_be_bytes();
        self.0.write_all(&[&length[..], &[2, u8::from(sasl), 0, 0], body].concat()).unwrap();
    }

    /// The next frame, which must be of that kind.
    fn expect(&mut self, code: u8) -> Vec<u8> {
        let mut head = [0; 8];
        self.0.read_exact(&mut head).unwrap();
        let mut body = vec![0; u32::from_be_bytes(head[..4].try_into().unwrap()) as usize - head.len()];
        self.0.read_exact(&mut body).unwrap();
        let text = String::from_utf8_lossy(&body);
        assert_eq!(&body[..3], &[0, 0x53, code], "the broker said {text:?}");
        body
    }
}

/// Publishes one message to `queue`, and waits until the broker keeps it.
pub(crate) fn publish(node: &Node, queue: &str, content_type: &str, body: &[u8]) {
    let mut publisher = Publisher(TcpStream::connect(node.address()).unwrap());
    publisher.0.set_read_timeout(Some(PATIENCE)).unwrap();
    publisher.greet(b"AMQP\x03\x01\0\0");
    publisher.expect(SASL_MECHANISMS);
    let login = [bytes(SYMBOL, b"PLAIN"), bytes(BINARY, b"\0guest\0guest")];
    publisher.send(true, &described(SASL_INIT, &login));
    publisher.expect(SASL_OUTCOME);
    publisher.greet(b"AMQP\0\x01\0\0");
    let vhost = format!("vhost:{}", node.vhost());
    publisher.send(false, &described(OPEN, &[bytes(STRING, b"publisher"), bytes(STRING, vhost.as_bytes())]));
    publisher.expect(OPEN);
    publisher.send(false, &described(BEGIN, &[NULL.into(), number(0), number(100), number(100)]));
    publisher.expect(BEGIN);
    let source = described(SOURCE, &[bytes(STRING, b"publisher")]);
    let target = described(TARGET, &[bytes(STRING, format!("/queues/{queue}").as_bytes())]);
    let [null, sends] = [NULL, FALSE].map(Vec::from);
    let name = bytes(STRING, b"jobs");
    let link = [
        name,
        number(0),
        sends,
        null.clone(),
        null.clone(),
        source,
        target,
        null.clone(),
        null.clone(),
        number(0),
    ];
    publisher.send(false, &described(ATTACH, &link));
    publisher.expect(ATTACH);
    publisher.expect(FLOW);
    let mut properties = vec![null; 6];
    properties.push(bytes(SYMBOL, content_type.as_bytes()));
    let data = [&[0, 0x53, DATA][..], &bytes(BINARY, body)].concat();
    let delivery = [number(0), number(0), bytes(BINARY, b"1"), number(0), FALSE.into()];
    let message = [described(TRANSFER, &delivery), described(PROPERTIES, &properties), data].concat();
    publisher.send(false, &message);
    let outcome = publisher.expect(DISPOSITION);
    const ACCEPTED: [u8; 3] = [0, 0x53, 0x24];
    assert!(outcome.windows(3).any(|window| window == ACCEPTED), "the broker did not take it: {outcome:x?}");
    publisher.send(false, &described(CLOSE, &[]));
    publisher.expect(CLOSE);
}
