//! Messages and packets of strongSwan's VICI, and nothing that sends them.
//!
//! **Layout** — strongSwan src/libcharon/plugins/vici/README.md: a packet is a type, for some types a name behind a byte of length, and
//! a message; a message is a row of elements: sections, values, lists. Names have a byte of length, values two, in network order.

use std::collections::BTreeMap;

/// Largest packet that charon takes or sends.
pub(super) const PACKET_MAX: usize = 512 * 1024;
/// Sections inside of each other that are followed.
const DEPTH_MAX: usize = 16;

const SECTION_START: u8 = 1;
const SECTION_END: u8 = 2;
const KEY_VALUE: u8 = 3;
const LIST_START: u8 = 4;
const LIST_ITEM: u8 = 5;
const LIST_END: u8 = 6;

const CMD_REQUEST: u8 = 0;
const CMD_RESPONSE: u8 = 1;
const CMD_UNKNOWN: u8 = 2;
const EVENT_REGISTER: u8 = 3;
const EVENT_CONFIRM: u8 = 5;
const EVENT_UNKNOWN: u8 = 6;
const EVENT: u8 = 7;

/// A message on its way out. It may hold a key, so it cannot be printed.
#[derive(Clone, Default)]
pub(super) struct Request(Vec<u8>);

impl Request {
    pub(super) fn value(mut self, key: &str, value: &str) -> Self {
        self.put(KEY_VALUE, key);
        self.put_value(value);
        self
    }

    pub(super) fn list(mut self, key: &str, items: &[&str]) -> Self {
        self.put(LIST_START, key);
        for item in items {
            self.0.push(LIST_ITEM);
            self.put_value(item);
        }
        self.0.push(LIST_END);
        self
    }

    pub(super) fn section(mut self, name: &str, inside: Self) -> Self {
        self.put(SECTION_START, name);
        self.0.extend(inside.0);
        self.0.push(SECTION_END);
        self
    }

    /// Names are ours, and short.
    fn put(&mut self, kind: u8, name: &str) {
        let name = &name.as_bytes()[..name.len().min(usize::from(u8::MAX))];
        self.0.extend([kind, name.len() as u8]);
        self.0.extend(name);
    }

    /// Values are held to this length where they come from.
    fn put_value(&mut self, value: &str) {
        let value = &value.as_bytes()[..value.len().min(usize::from(u16::MAX))];
        self.0.extend((value.len() as u16).to_be_bytes());
        self.0.extend(value);
    }

    /// The packet that asks for a command, with its length in front.
    pub(super) fn command(&self, name: &str) -> Vec<u8> {
        packet(CMD_REQUEST, name, &self.0)
    }
}

/// The packet that asks for events of a kind from now on.
pub(super) fn register(event: &str) -> Vec<u8> {
    packet(EVENT_REGISTER, event, &[])
}

fn packet(kind: u8, name: &str, message: &[u8]) -> Vec<u8> {
    let len = (2 + name.len() + message.len()) as u32;
    [&len.to_be_bytes()[..], &[kind, name.len() as u8], name.as_bytes(), message].concat()
}

/// What charon says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Answer {
    /// To a command.
    Response(Section),
    /// There is no such command.
    UnknownCommand,
    /// Events of the kind come from now on.
    Confirmed,
    /// There are no such events.
    UnknownEvent,
    /// Something happened.
    Event(String, Section),
}

impl Answer {
    /// Reads a packet; none if it is none.
    pub(super) fn parse(packet: &[u8]) -> Option<Self> {
        let (kind, rest) = packet.split_first()?;
        Some(match *kind {
            CMD_RESPONSE => Self::Response(Section::parse(rest)?),
            CMD_UNKNOWN => Self::UnknownCommand,
            EVENT_CONFIRM => Self::Confirmed,
            EVENT_UNKNOWN => Self::UnknownEvent,
            EVENT => {
                let mut reader = Reader(rest);
                let name = reader.name()?;
                Self::Event(name, Section::parse(reader.0)?)
            }
            _ => return None,
        })
    }
}

/// A message that came. Only what somebody reads is text: the rest of what charon tells may be anything.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Section {
    pub(super) values: BTreeMap<String, String>,
    pub(super) lists: BTreeMap<String, Vec<String>>,
    pub(super) sections: BTreeMap<String, Self>,
}

impl Section {
    pub(super) fn parse(message: &[u8]) -> Option<Self> {
        let mut reader = Reader(message);
        let root = reader.section(0)?;
        reader.0.is_empty().then_some(root)
    }

    /// A value, or nothing in it.
    pub(super) fn text(&self, key: &str) -> &str {
        self.values.get(key).map_or("", String::as_str)
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    /// The elements up to the end of the section, or at depth 0 up to the end of the message.
    fn section(&mut self, depth: usize) -> Option<Section> {
        let mut found = Section::default();
        loop {
            if self.0.is_empty() && depth == 0 {
                return Some(found);
            }
            match self.byte()? {
                SECTION_START if depth < DEPTH_MAX => {
                    let name = self.name()?;
                    found.sections.insert(name, self.section(depth + 1)?);
                }
                SECTION_END if depth > 0 => return Some(found),
                KEY_VALUE => {
                    let name = self.name()?;
                    found.values.insert(name, self.value()?);
                }
                LIST_START => {
                    let name = self.name()?;
                    found.lists.insert(name, self.list()?);
                }
                _ => return None,
            }
        }
    }

    fn list(&mut self) -> Option<Vec<String>> {
        let mut items = Vec::new();
        loop {
            match self.byte()? {
                LIST_ITEM => items.push(self.value()?),
                LIST_END => return Some(items),
                _ => return None,
            }
        }
    }

    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*byte)
    }

    fn name(&mut self) -> Option<String> {
        let len = self.byte()?;
        self.bytes(len.into())
    }

    fn value(&mut self) -> Option<String> {
        let len = u16::from_be_bytes([self.byte()?, self.byte()?]);
        self.bytes(len.into())
    }

    fn bytes(&mut self, len: usize) -> Option<String> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(String::from_utf8_lossy(bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Request {
        let inner = Request::default().value("key2", "value2");
        let section = Request::default().section("sub-section", inner).list("list1", &["item1", "item2"]);
        Request::default().value("key1", "value1").section("section1", section)
    }

    /// The example of strongSwan's description.
    const EXAMPLE: &[u8] = b"\x03\x04key1\0\x06value1\x01\x08section1\x01\x0bsub-section\
        \x03\x04key2\0\x06value2\x02\x04\x05list1\x05\0\x05item1\x05\0\x05item2\x06\x02";

    #[test]
    fn messages_are_as_strongswan_describes_them() {
        assert_eq!(example().0, EXAMPLE);
        let read = Section::parse(EXAMPLE).unwrap();
        assert_eq!(read.text("key1"), "value1");
        assert_eq!(read.text("key2"), "");
        let section = &read.sections["section1"];
        assert_eq!(section.sections["sub-section"].text("key2"), "value2");
        assert_eq!(section.lists["list1"], ["item1", "item2"]);
        assert_eq!(Section::parse(&[]), Some(Section::default()));
    }

    #[test]
    fn packets_have_a_length_a_type_and_perhaps_a_name() {
        let message = Request::default().value("a", "b");
        assert_eq!(message.command("version"), b"\0\0\0\x0f\0\x07version\x03\x01a\0\x01b");
        assert_eq!(register("log"), b"\0\0\0\x05\x03\x03log");
        let said = Section { values: [("a".into(), "b".into())].into(), ..Section::default() };
        assert_eq!(Answer::parse(b"\x01\x03\x01a\0\x01b"), Some(Answer::Response(said.clone())));
        assert_eq!(Answer::parse(b"\x07\x03log\x03\x01a\0\x01b"), Some(Answer::Event("log".into(), said)));
        assert_eq!(Answer::parse(b"\x02"), Some(Answer::UnknownCommand));
        assert_eq!(Answer::parse(b"\x05"), Some(Answer::Confirmed));
        assert_eq!(Answer::parse(b"\x06"), Some(Answer::UnknownEvent));
        for broken in [&b""[..], b"\x00", b"\x09", b"\x07", b"\x07\x09log", b"\x01\x03"] {
            assert_eq!(Answer::parse(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn broken_messages_are_refused() {
        for cut in 1..EXAMPLE.len() {
            // Whole up to there, or not at all.
            let read = Section::parse(&EXAMPLE[..cut]);
            assert!(read.is_none() || cut == 14, "{cut}: {read:?}");
        }
        for broken in [&b"\x02"[..], b"\x05\0\x01a", b"\x06", b"\x04\x01a\x04\x01b\x06\x06", b"\x08"] {
            assert_eq!(Section::parse(broken), None, "{broken:?}");
        }
        let deep = [&b"\x01\x01a"[..]; 40].concat();
        assert_eq!(Section::parse(&[deep, vec![SECTION_END; 40]].concat()), None);
    }
}
