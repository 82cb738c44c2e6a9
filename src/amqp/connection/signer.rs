//! What a worker writes on a job for the next worker that gets it, signed, because any publisher can write the same.
//!
//! The key is made from what all workers of a broker have and publishers should not: the password of their user, or
//! the key of their certificate. A worker with another one takes no notice of such words.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lapin::BasicProperties;
use ring::{digest, hmac};

/// Signs, and tells what was signed. Cheap to clone.
#[derive(Clone, Debug)]
pub(in crate::amqp) struct Signer(hmac::Key);

impl Signer {
    pub(in crate::amqp) fn new(secret: &[u8]) -> Self {
        // No key of another purpose.
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"sandpiper: words of a worker on a job");
        Self(hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&key, secret).as_ref()))
    }

    /// For `words` on this message.
    pub(in crate::amqp) fn sign(
        &self,
        words: [&str; 2],
        properties: &BasicProperties,
        body: &[u8],
    ) -> String {
        STANDARD.encode(hmac::sign(&self.0, &said(words, properties, body)))
    }

    /// Whether a worker wrote `words` on this message.
    pub(in crate::amqp) fn verify(
        &self,
        words: [&str; 2],
        properties: &BasicProperties,
        body: &[u8],
        signature: &str,
    ) -> bool {
        let signature = STANDARD.decode(signature).unwrap_or_default();
        hmac::verify(&self.0, &said(words, properties, body), &signature).is_ok()
    }
}

/// The words and the message that they are on: on another one they say nothing. Each with its length before it.
fn said(words: [&str; 2], properties: &BasicProperties, body: &[u8]) -> Vec<u8> {
    let names = [properties.message_id(), properties.correlation_id(), properties.reply_to()];
    let names = names.map(|name| name.as_ref().map_or("", |name| name.as_str()));
    let mut all = digest::digest(&digest::SHA256, body).as_ref().to_vec();
    for part in words.into_iter().chain(names) {
        all.extend(part.len().to_be_bytes());
        all.extend(part.as_bytes());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_hold_for_their_message_and_under_their_key() {
        let signer = Signer::new(b"guest\0secret");
        let properties = BasicProperties::default().with_message_id("one".into());
        let signature = signer.sign(["3", "alice"], &properties, b"job");
        assert!(signer.verify(["3", "alice"], &properties, b"job", &signature));
        let other = BasicProperties::default().with_correlation_id("one".into());
        for forged in [
            signer.verify(["2", "alice"], &properties, b"job", &signature),
            signer.verify(["3a", "lice"], &properties, b"job", &signature),
            signer.verify(["3", "alice"], &other, b"job", &signature),
            signer.verify(["3", "alice"], &properties, b"bob", &signature),
            signer.verify(["3", "alice"], &properties, b"job", ""),
            Signer::new(b"guest\0other").verify(["3", "alice"], &properties, b"job", &signature),
        ] {
            assert!(!forged);
        }
    }
}
