//! The expressions that rules are made of in the kernel, as values and on the wire.
//!
//! A rule is a little program: load something into a register, compare it, go on or stop, then a verdict. One register
//! (NFT_REG_1) is enough for all we say, and is what nft uses too.

use super::wire::{Attributes, attribute, attributes, number, text};

/// What the kernel executes (uapi/linux/netfilter/nf_tables.h).
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Expression {
    /// Load something known about the packet.
    Meta(Meta),
    /// Load bytes of the network header.
    Payload { offset: u32, length: u32 },
    /// Keep these bits of what was loaded.
    Mask(Vec<u8>),
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
    /// A test by an iptables extension (`nft_compat`), with its own binary argument.
    Extension { name: String, argument: Vec<u8> },
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
            Self::Mask(_) => "bitwise",
            Self::Compare { .. } => "cmp",
            Self::Lookup { .. } => "lookup",
            Self::Counter => "counter",
            Self::Accept | Self::Drop | Self::Return | Self::Jump(_) => "immediate",
            Self::Masquerade { .. } => "masq",
            Self::Extension { .. } => "match",
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
            Self::Extension { name, argument } => {
                out.text(1, name).number(2, 0).bytes(3, argument);
            }
        }
    }

    /// One element of a rule's list; none if it is anything else than what can be said here.
    fn read(element: &[u8]) -> Option<Self> {
        let arguments = attribute(element, 2).unwrap_or_default();
        let in_register = |kind| number(arguments, kind) == Some(REGISTER);
        match text(element, 1)? {
            "meta" if in_register(1) => Some(Self::Meta(Meta::of(number(arguments, 2)?)?)),
            "payload" if in_register(1) && number(arguments, 2)? == NETWORK_HEADER => {
                Some(Self::Payload { offset: number(arguments, 3)?, length: number(arguments, 4)? })
            }
            "bitwise" if in_register(1) && in_register(2) && plain_mask(arguments) => {
                Some(Self::Mask(attribute(attribute(arguments, 4)?, 1)?.to_vec()))
            }
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
            "counter" => Some(Self::Counter),
            "immediate" if number(arguments, 1)? == VERDICT => {
                read_verdict(attribute(attribute(arguments, 2)?, 2)?)
            }
            "masq" if attribute(arguments, 2).is_none() => {
                Some(Self::Masquerade { flags: number(arguments, 1).unwrap_or(0) })
            }
            "match" => Some(Self::Extension {
                name: text(arguments, 1)?.to_owned(),
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

fn read_verdict(verdict: &[u8]) -> Option<Expression> {
    match number(verdict, 1)? {
        ACCEPT => Some(Expression::Accept),
        DROP => Some(Expression::Drop),
        RETURN => Some(Expression::Return),
        JUMP => Some(Expression::Jump(text(verdict, 2)?.to_owned())),
        _ => None,
    }
}

/// Whether a bitwise is `register & mask`, without an exclusive or and without a shift.
fn plain_mask(arguments: &[u8]) -> bool {
    const MASK_AND_XOR: u32 = 0;
    let xor = attribute(arguments, 5).and_then(|data| attribute(data, 1)).unwrap_or_default();
    number(arguments, 6).unwrap_or(MASK_AND_XOR) == MASK_AND_XOR && xor.iter().all(|byte| *byte == 0)
}
