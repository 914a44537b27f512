//! The expressions that rules are made of in the kernel, as values and on the wire.
//!
//! A rule is a little program: load something into a register, compare it, go on or stop, then a verdict. One register
//! (NFT_REG_1) is enough for all we say, and is what nft uses too.

use super::packet::{key_of, offset, protocol_of};
use super::wire::{Attributes, attribute, attributes, number, text};
use crate::words::addr::Family;
use crate::words::rule::Side;

/// What the kernel executes (uapi/linux/netfilter/nf_tables.h).
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Expression {
    /// Load something known about the packet.
    Meta(Meta),
    /// Load bytes of the network header.
    Payload { offset: u32, length: u32 },
    /// Keep these bits of what was loaded.
    Mask(Vec<u8>),
    /// Set these bits, in the host's byte order, of what was loaded.
    AddBits(u32),
    /// Make what was loaded the packet's mark.
    SetMark,
    /// Go on if what was loaded is, or is not, this.
    Compare { equal: bool, value: Vec<u8> },
    /// Go on if what was loaded is, or is not, in a set of the table.
    Lookup { set: String, negated: bool },
    /// Count the packet.
    Counter,
    /// Decide.
    Accept,
    /// Decide.
    Drop,
    /// Back to the calling chain.
    Return,
    /// Into another chain.
    Jump(String),
    /// Rewrite the source.
    Masquerade { flags: u32 },
    /// Load the protocol above the network header, or the destination port, into a register: part of a map's key.
    KeyPart { part: KeyPart, register: u32 },
    /// Load bytes of what follows the network header.
    Transport { offset: u32, length: u32 },
    /// Replace what was loaded, from the first register on, by what a map of the table has for it; go on only if it has.
    Translate { map: String },
    /// Load whether the destination is an address of this host (an RTN_ number, in the host's byte order).
    DestinationType,
    /// Load something known about the packet's connection, in the host's byte order.
    Connection(Connection),
    /// Rewrite source or destination with the address that was loaded, and the port if its register is named.
    Nat { kind: NatKind, family: Family, port: Option<u32> },
    /// A test by an iptables extension (`nft_compat`), with its own binary argument.
    Extension { name: String, revision: u32, argument: Vec<u8> },
    /// What an iptables extension does with the packet, likewise.
    Target { name: String, revision: u32, argument: Vec<u8> },
}

/// What is known about a packet besides its bytes (`nft_meta_keys`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Meta {
    /// The mark, in the host's byte order.
    Mark,
    /// Name of the incoming interface, 16 bytes.
    InputName,
    /// Name of the outgoing interface, 16 bytes.
    OutputName,
    /// Family of the packet: 2 or 10.
    Protocol,
}

impl Meta {
    const ALL: [(Self, u32); 4] =
        [(Self::Mark, 3), (Self::InputName, 6), (Self::OutputName, 7), (Self::Protocol, 15)];

    fn code(self) -> u32 {
        match self {
            Self::Mark => 3,
            Self::InputName => 6,
            Self::OutputName => 7,
            Self::Protocol => 15,
        }
    }

    fn of(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, known)| *known == code).map(|(meta, _)| meta)
    }
}

/// What a map's key is made of, beside an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum KeyPart {
    /// `meta l4proto`, 1 byte.
    Protocol,
    /// `th dport`, 2 bytes in network order.
    Port,
}

/// What is known about a connection (`nft_ct_keys`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Connection {
    /// Bits of what the packet is to it.
    State,
    /// Bits of what was done to it.
    Status,
}

/// Which end is rewritten (`nft_nat_types`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NatKind {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

impl Connection {
    const fn code(self) -> u32 {
        match self {
            Self::State => 0,
            Self::Status => 2,
        }
    }
}

/// NFT_META_L4PROTO.
const L4_PROTOCOL: u32 = 16;
/// NFT_PAYLOAD_TRANSPORT_HEADER.
const TRANSPORT_HEADER: u32 = 2;
/// Where the destination port is in it: TCP, UDP and SCTP agree.
const DESTINATION_PORT: (u32, u32) = (2, 2);
/// `nft_fib_result` and `nft_fib_flags`: the type of the destination address.
const FIB_ADDRESS_TYPE: u32 = 3;
const FIB_DESTINATION: u32 = 2;

/// Flags of a translation that follow from its having an address and a port (NF_NAT_RANGE_MAP_IPS, _PROTO_SPECIFIED).
const NAT_IMPLIED: u32 = 3;

/// NFT_REG_1.
const REGISTER: u32 = 1;
/// NFT_REG_VERDICT.
const VERDICT: u32 = 0;
/// NFT_PAYLOAD_NETWORK_HEADER.
const NETWORK_HEADER: u32 = 1;

/// `nft_verdicts` and netfilter's own.
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
const JUMP: u32 = -3i32 as u32;
const RETURN: u32 = -5i32 as u32;

impl Expression {
    /// As an element of a rule's list.
    pub(super) fn write(&self, out: &mut Attributes) {
        const ELEMENT: u16 = 1;
        out.nest(ELEMENT, |out| {
            out.text(1, self.name());
            out.nest(2, |out| self.write_arguments(out));
        });
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Meta(_) => "meta",
            Self::Payload { .. } => "payload",
            Self::Mask(_) | Self::AddBits(_) => "bitwise",
            Self::SetMark => "meta",
            Self::Compare { .. } => "cmp",
            Self::Lookup { .. } => "lookup",
            Self::Counter => "counter",
            Self::Accept | Self::Drop | Self::Return | Self::Jump(_) => "immediate",
            Self::Masquerade { .. } => "masq",
            Self::KeyPart { part: KeyPart::Protocol, .. } => "meta",
            Self::KeyPart { part: KeyPart::Port, .. } => "payload",
            Self::Transport { .. } => "payload",
            Self::Translate { .. } => "lookup",
            Self::DestinationType => "fib",
            Self::Connection(_) => "ct",
            Self::Nat { .. } => "nat",
            Self::Extension { .. } => "match",
            Self::Target { .. } => "target",
        }
    }

    fn write_arguments(&self, out: &mut Attributes) {
        match self {
            Self::Meta(meta) => {
                out.number(1, REGISTER).number(2, meta.code());
            }
            Self::Payload { offset, length } => {
                out.number(1, REGISTER).number(2, NETWORK_HEADER).number(3, *offset).number(4, *length);
            }
            Self::Mask(mask) => {
                out.number(1, REGISTER).number(2, REGISTER).number(3, mask.len() as u32);
                value(out, 4, mask);
                value(out, 5, &vec![0; mask.len()]);
            }
            Self::AddBits(bits) => {
                out.number(1, REGISTER).number(2, REGISTER).number(3, 4);
                value(out, 4, &(!bits).to_ne_bytes());
                value(out, 5, &bits.to_ne_bytes());
            }
            Self::SetMark => {
                out.number(2, Meta::Mark.code()).number(3, REGISTER);
            }
            Self::Compare { equal, value: bytes } => {
                out.number(1, REGISTER).number(2, u32::from(!equal));
                value(out, 3, bytes);
            }
            Self::Lookup { set, negated } => {
                out.text(1, set).number(2, REGISTER);
                if *negated {
                    out.number(5, 1);
                }
            }
            Self::Counter => {
                out.long(1, 0).long(2, 0);
            }
            Self::Accept => verdict(out, ACCEPT, None),
            Self::Drop => verdict(out, DROP, None),
            Self::Return => verdict(out, RETURN, None),
            Self::Jump(chain) => verdict(out, JUMP, Some(chain)),
            Self::Masquerade { flags } => {
                if *flags != 0 {
                    out.number(1, *flags);
                }
            }
            Self::KeyPart { part: KeyPart::Protocol, register } => {
                out.number(1, *register).number(2, L4_PROTOCOL);
            }
            Self::KeyPart { part: KeyPart::Port, register } => {
                let (offset, length) = DESTINATION_PORT;
                out.number(1, *register).number(2, TRANSPORT_HEADER).number(3, offset).number(4, length);
            }
            Self::Transport { offset, length } => {
                out.number(1, REGISTER).number(2, TRANSPORT_HEADER).number(3, *offset).number(4, *length);
            }
            Self::Translate { map } => {
                out.text(1, map).number(2, REGISTER).number(3, REGISTER);
            }
            Self::DestinationType => {
                out.number(1, REGISTER).number(2, FIB_ADDRESS_TYPE).number(3, FIB_DESTINATION);
            }
            Self::Connection(key) => {
                out.number(1, REGISTER).number(2, key.code());
            }
            Self::Nat { kind, family, port } => {
                let kind = u32::from(*kind == NatKind::Destination);
                out.number(1, kind).number(2, protocol_of(*family).into()).number(3, REGISTER);
                if let Some(port) = port {
                    out.number(5, *port);
                }
            }
            // NFTA_MATCH_* and NFTA_TARGET_* have the same numbers.
            Self::Extension { name, revision, argument } | Self::Target { name, revision, argument } => {
                out.text(1, name).number(2, *revision).bytes(3, argument);
            }
        }
    }

    /// One element of a rule's list; none if it is anything else than what can be said here.
    fn read(element: &[u8]) -> Option<Self> {
        let arguments = attribute(element, 2).unwrap_or_default();
        let in_register = |kind| number(arguments, kind) == Some(REGISTER);
        match text(element, 1)? {
            "meta" if number(arguments, 2) == Some(L4_PROTOCOL) => {
                Some(Self::KeyPart { part: KeyPart::Protocol, register: number(arguments, 1)? })
            }
            "meta" if in_register(3) => (number(arguments, 2)? == Meta::Mark.code()).then_some(Self::SetMark),
            "meta" if in_register(1) => Some(Self::Meta(Meta::of(number(arguments, 2)?)?)),
            "payload" if number(arguments, 2)? == TRANSPORT_HEADER => {
                let (offset, length) = (number(arguments, 3)?, number(arguments, 4)?);
                match (offset, length) == DESTINATION_PORT {
                    true => Some(Self::KeyPart { part: KeyPart::Port, register: number(arguments, 1)? }),
                    false => in_register(1).then_some(Self::Transport { offset, length }),
                }
            }
            "payload" if in_register(1) && number(arguments, 2)? == NETWORK_HEADER => {
                Some(Self::Payload { offset: number(arguments, 3)?, length: number(arguments, 4)? })
            }
            "bitwise" if in_register(1) && in_register(2) && plain_mask(arguments) => {
                Some(Self::Mask(attribute(attribute(arguments, 4)?, 1)?.to_vec()))
            }
            "bitwise" if in_register(1) && in_register(2) => added_bits(arguments).map(Self::AddBits),
            "cmp" if in_register(1) => Some(Self::Compare {
                equal: match number(arguments, 2)? {
                    0 => true,
                    1 => false,
                    _ => return None,
                },
                value: attribute(attribute(arguments, 3)?, 1)?.to_vec(),
            }),
            "lookup" if in_register(2) && attribute(arguments, 3).is_none() => Some(Self::Lookup {
                set: text(arguments, 1)?.to_owned(),
                negated: number(arguments, 5).unwrap_or(0) == 1,
            }),
            "lookup" if in_register(2) && in_register(3) && number(arguments, 5).unwrap_or(0) == 0 => {
                Some(Self::Translate { map: text(arguments, 1)?.to_owned() })
            }
            "fib" if in_register(1) => (number(arguments, 2)? == FIB_ADDRESS_TYPE
                && number(arguments, 3)? == FIB_DESTINATION)
                .then_some(Self::DestinationType),
            "ct" if in_register(1) && attribute(arguments, 3).is_none() => {
                let key = number(arguments, 2)?;
                let known =
                    [Connection::State, Connection::Status].into_iter().find(|known| known.code() == key);
                known.map(Self::Connection)
            }
            "nat" => read_nat(arguments),
            "counter" => Some(Self::Counter),
            "immediate" if number(arguments, 1)? == VERDICT => {
                read_verdict(attribute(attribute(arguments, 2)?, 2)?)
            }
            "masq" if attribute(arguments, 2).is_none() => {
                Some(Self::Masquerade { flags: number(arguments, 1).unwrap_or(0) })
            }
            "match" => Some(Self::Extension {
                name: text(arguments, 1)?.to_owned(),
                revision: number(arguments, 2)?,
                argument: attribute(arguments, 3)?.to_vec(),
            }),
            "target" => Some(Self::Target {
                name: text(arguments, 1)?.to_owned(),
                revision: number(arguments, 2)?,
                argument: attribute(arguments, 3)?.to_vec(),
            }),
            _ => None,
        }
    }

    /// A rule's whole list; none if anything in it cannot be said here.
    pub(super) fn read_all(list: &[u8]) -> Option<Vec<Self>> {
        attributes(list).map(|(_, element)| Self::read(element)).collect()
    }
}

/// `nft_data` with plain bytes.
fn value(out: &mut Attributes, kind: u16, bytes: &[u8]) {
    out.nest(kind, |out| {
        out.bytes(1, bytes);
    });
}

/// Arguments of `immediate` that put a verdict into the verdict register.
fn verdict(out: &mut Attributes, code: u32, chain: Option<&str>) {
    out.number(1, VERDICT).nest(2, |out| {
        out.nest(2, |out| {
            out.number(1, code);
            if let Some(chain) = chain {
                out.text(2, chain);
            }
        });
    });
}

/// The kernel says the end of each range too; ours is its beginning.
fn read_nat(arguments: &[u8]) -> Option<Expression> {
    let kind = match number(arguments, 1)? {
        0 => NatKind::Source,
        1 => NatKind::Destination,
        _ => return None,
    };
    let family = number(arguments, 2)?;
    let family =
        [Family::V4, Family::V6].into_iter().find(|known| u32::from(protocol_of(*known)) == family)?;
    let port = number(arguments, 5);
    let plain = number(arguments, 3)? == REGISTER
        && number(arguments, 4).is_none_or(|end| end == REGISTER)
        && number(arguments, 6) == port
        && number(arguments, 7).unwrap_or(0) & !NAT_IMPLIED == 0;
    plain.then_some(Expression::Nat { kind, family, port })
}

fn read_verdict(verdict: &[u8]) -> Option<Expression> {
    match number(verdict, 1)? {
        ACCEPT => Some(Expression::Accept),
        DROP => Some(Expression::Drop),
        RETURN => Some(Expression::Return),
        JUMP => Some(Expression::Jump(text(verdict, 2)?.to_owned())),
        _ => None,
    }
}

/// The bits that a bitwise sets, if it does nothing else: `(register & !bits) ^ bits`.
fn added_bits(arguments: &[u8]) -> Option<u32> {
    let word = |kind| Some(u32::from_ne_bytes(attribute(attribute(arguments, kind)?, 1)?.try_into().ok()?));
    let (mask, xor) = (word(4)?, word(5)?);
    (number(arguments, 6).unwrap_or(MASK_AND_XOR) == MASK_AND_XOR && mask == !xor).then_some(xor)
}

/// NFT_BITWISE_MASK_XOR.
const MASK_AND_XOR: u32 = 0;

/// Whether a bitwise is `register & mask`, without an exclusive or and without a shift.
fn plain_mask(arguments: &[u8]) -> bool {
    let xor = attribute(arguments, 5).and_then(|data| attribute(data, 1)).unwrap_or_default();
    number(arguments, 6).unwrap_or(MASK_AND_XOR) == MASK_AND_XOR && xor.iter().all(|byte| *byte == 0)
}

/// Loads an address of the packet.
pub(super) const fn address_at(family: Family, side: Side) -> Expression {
    Expression::Payload { offset: offset(family, side), length: key_of(family).1 }
}

/// Before bytes of a header are looked at, the packet has to be of that family.
pub(super) fn depend(out: &mut Vec<Expression>, known: &mut Option<Family>, family: Family) {
    if *known != Some(family) {
        out.push(Expression::Meta(Meta::Protocol));
        out.push(Expression::Compare { equal: true, value: vec![protocol_of(family)] });
        *known = Some(family);
    }
}
