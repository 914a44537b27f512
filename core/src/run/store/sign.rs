//! Who has written a lease: a node signs what it writes with the number of the grant that it attaches the key to.
//!
//! Keys and values are flannel's byte for byte, so there is no room for a signature in them; the number of a grant is the
//! client's to choose (etcd api/etcdserverpb/rpc.proto, `LeaseGrantRequest.ID`), and nobody else looks at it. Go flanneld
//! leaves the choice to the server: what it wrote is unsigned.
//!
//! **Shape** — 63 bits: 15 that say "signed" and what for, 32 of the node, 16 at random.
//!
//! **Why** — two hosts may come with one public address, and by the address alone the second would take the first one's
//! lease. So it asks: it writes the key as it is, attached to a grant that says so. Peers see no change; whoever holds the lease
//! and lives writes it again at once, and that is the answer.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::words::lease::Subnets;

/// A node, as its grants name it. Made once and kept in the state directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeMark(pub u32);

/// Who has signed which lease; leases that nobody signed are missing. Only etcd's are signed.
pub type Signs = BTreeMap<Subnets, Sign>;

/// What a grant says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sign {
    /// Nothing: Go flanneld's, an operator's, or none.
    Unsigned,
    /// The node that holds the lease.
    Holds(NodeMark),
    /// A node that asks whether the holder lives.
    Asks(NodeMark),
}

/// What a key's grant says to a node about who wrote it last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hand {
    /// This node, or a copy of it.
    Ours,
    /// Nobody says.
    Unsigned,
    /// Another node.
    Another,
    /// Somebody who asks whether the holder lives.
    Asking,
}

/// How long a holder has for its answer. It takes one that lives some milliseconds; etcd, or the host, may be busy.
pub const ASK: Duration = Duration::from_secs(2);

const HOLDS: i64 = 0x7f1a;
const ASKS: i64 = 0x7f1b;

impl Sign {
    pub(super) const fn of(grant: i64) -> Self {
        let mark = NodeMark(((grant >> 16) & 0xffff_ffff) as u32);
        match grant >> 48 {
            HOLDS => Self::Holds(mark),
            ASKS => Self::Asks(mark),
            _ => Self::Unsigned,
        }
    }

    /// A number for a new grant; none for the server to choose.
    pub(super) fn number(self) -> Option<i64> {
        let (what, NodeMark(mark)) = match self {
            Self::Unsigned => return None,
            Self::Holds(mark) => (HOLDS, mark),
            Self::Asks(mark) => (ASKS, mark),
        };
        Some(what << 48 | i64::from(mark) << 16 | i64::from(fastrand::u16(..)))
    }

    pub(super) fn hand(self, ours: NodeMark) -> Hand {
        match self {
            Self::Asks(_) => Hand::Asking,
            Self::Holds(mark) if ours == mark => Hand::Ours,
            Self::Holds(_) => Hand::Another,
            Self::Unsigned => Hand::Unsigned,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_says_who_and_what_for_and_a_servers_says_nothing() {
        for mark in [NodeMark(0), NodeMark(7), NodeMark(u32::MAX)] {
            for sign in [Sign::Holds(mark), Sign::Asks(mark)] {
                let number = sign.number().unwrap();
                assert!(number > 0, "etcd takes 0 for none and refuses what is negative");
                assert_eq!(Sign::of(number), sign);
            }
        }
        // As etcd 3.4 makes them: member, time, counter.
        for number in [0, 7_587_870_155_438_393_612, 0x694d_8b1e_4e5c_7a10] {
            assert_eq!(Sign::of(number), Sign::Unsigned);
        }
        assert_eq!(Sign::Unsigned.number(), None);
    }

    #[test]
    fn a_hand_is_known_by_its_mark() {
        let (us, other) = (NodeMark(1), NodeMark(2));
        assert_eq!(Sign::Holds(other).hand(us), Hand::Another);
        assert_eq!(Sign::Holds(us).hand(us), Hand::Ours);
        assert_eq!(Sign::Unsigned.hand(us), Hand::Unsigned);
        assert_eq!(Sign::Asks(us).hand(us), Hand::Asking);
    }
}
