//! What charon tells by itself: its log, and tunnels that come and go.

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::client::{Client, ViciError};
use super::message::Section;
use crate::words::ipsec::Connection;

/// Something of interest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum News {
    /// A tunnel came or went, or somebody unloaded something: reason to look.
    Changed,
    /// Why there is no tunnel to a peer.
    Cause(Connection, Cause),
    /// charon says nothing any more.
    Over,
}

/// Words of charon's (strongSwan src/libcharon/sa/ikev2, src/libcharon/plugins/kernel_netlink) and what they come from, the weightiest
/// first: one trouble has many words.
const CAUSES: &[(&str, &str)] = &[
    ("unable to add SAD entry", NO_ESP),
    ("unable to install", NO_ESP),
    ("MAC mismatched", "the peer has another key: Backend.PSK is not the same on both hosts"),
    (
        "AUTHENTICATION_FAILED notify",
        "the peer refuses our key: Backend.PSK is not the same on both hosts, or the peer does not know this host yet",
    ),
    ("no shared key found", "one of both hosts has no key for the other yet"),
    (" not supported", "charon lacks a method: apt-get install libstrongswan-standard-plugins"),
    ("no acceptable proposal found", "the peer wants another Backend.ESPProposal"),
    (
        "NO_PROPOSAL_CHOSEN notify, no CHILD_SA",
        "the peer wants another Backend.ESPProposal, or its kernel takes no ESP: see its log",
    ),
    ("TS_UNACCEPTABLE notify", "the peer does not know this host's subnet yet"),
    ("NO_PROPOSAL_CHOSEN notify error", "the peer does not know this host yet"),
    ("giving up after", NO_ANSWER),
    ("retransmit 2 of", NO_ANSWER),
];
const NO_ESP: &str = "the kernel of this host takes no ESP, or not with this encryption: modprobe esp4 (CONFIG_INET_ESP, CONFIG_CRYPTO_GCM)";
const NO_ANSWER: &str = "the peer does not answer on UDP port 500";

/// Why there is no tunnel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Cause(usize);

impl Cause {
    pub(super) fn text(self) -> &'static str {
        CAUSES.get(self.0).map_or("", |(_, text)| text)
    }
}

/// Listens until dropped.
pub(super) struct Listener(JoinHandle<()>);

impl Listener {
    pub(super) async fn start(news: mpsc::UnboundedSender<News>) -> Result<Self, ViciError> {
        let mut client = Client::connect().await?;
        for event in ["log", "ike-updown", "child-updown"] {
            client.register(event).await?;
        }
        Ok(Self(tokio::spawn(async move {
            while let Ok((event, told)) = client.event().await {
                if let Some(one) = of_interest(&event, &told)
                    && news.send(one).is_err()
                {
                    return;
                }
            }
            let _ = news.send(News::Over);
        })))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn of_interest(event: &str, told: &Section) -> Option<News> {
    if event != "log" {
        return told.sections.keys().find_map(|name| Connection::parse(name)).map(|_| News::Changed);
    }
    let (group, name, text) = (told.text("group"), told.text("ikesa-name"), told.text("msg"));
    tracing::debug!("charon: [{group}] {name} {}", on_one_line(text));
    if text.starts_with("removed vici connection") || text.starts_with("unloaded shared key") {
        return Some(News::Changed);
    }
    let cause = CAUSES.iter().position(|(words, _)| text.contains(words))?;
    Some(News::Cause(Connection::parse(name)?, Cause(cause)))
}

/// Text of another program's for our log.
pub(super) fn on_one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(name: &str, text: &str) -> Option<News> {
        let values = [("group", "IKE"), ("ikesa-name", name), ("msg", text)];
        let values = values.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        of_interest("log", &Section { values, ..Section::default() })
    }

    #[test]
    fn charons_words_become_causes() {
        let name = "192.0.2.1-10.100.5.0/24-10.100.9.0/24-192.0.2.9";
        let Some(News::Cause(connection, cause)) = said(name, "received AUTHENTICATION_FAILED notify error")
        else {
            panic!()
        };
        assert_eq!(connection.to_string(), name);
        assert!(cause.text().contains("PSK"), "{cause:?}");
        // What is wrong here outweighs what the peer makes of it.
        let Some(News::Cause(_, here)) = said(name, "unable to add SAD entry with SPI c0ffee (FAILED)")
        else {
            panic!()
        };
        assert!(here < cause && here.text().contains("esp4"));
        assert_eq!(said("home", "received AUTHENTICATION_FAILED notify error"), None);
        assert_eq!(said(name, "sending packet"), None);
        assert_eq!(said("", "removed vici connection: x"), Some(News::Changed));
        let mut section = Section::default();
        section.sections.insert("home".into(), Section::default());
        assert_eq!(of_interest("child-updown", &section), None);
        section.sections.insert(name.into(), Section::default());
        assert_eq!(of_interest("child-updown", &section), Some(News::Changed));
    }
}
