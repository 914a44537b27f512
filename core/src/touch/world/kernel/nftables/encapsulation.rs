//! What packets of a tunnel look like to a rule.

use super::expression::{Expression, KeyPart};
use crate::words::rule::{Encapsulation, Match};
use crate::words::units::{Port, Vni};

/// uapi/linux/in.h
const UDP: u8 = 17;
const IPIP: u8 = 4;
/// Where the network identifier is behind the beginning of the UDP header, and its length (RFC 768, RFC 7348 §5).
const VNI: (u32, u32) = (8 + 4, 3);

/// The test for packets of a tunnel.
pub(super) fn lower_test(out: &mut Vec<Expression>, encapsulation: Encapsulation) {
    let equal = |value: &[u8]| Expression::Compare { equal: true, value: value.to_vec() };
    out.push(Expression::KeyPart { part: KeyPart::Protocol, register: 1 });
    match encapsulation {
        Encapsulation::Ipip => out.push(equal(&[IPIP])),
        Encapsulation::Vxlan { port, vni } => {
            let (offset, length) = VNI;
            out.push(equal(&[UDP]));
            out.push(Expression::KeyPart { part: KeyPart::Port, register: 1 });
            out.push(equal(&port.number().to_be_bytes()));
            out.push(Expression::Transport { offset, length });
            out.push(equal(&vni.id().to_be_bytes()[1..]));
        }
    }
}

/// The same, read back.
pub(super) fn raise_test(list: &[Expression]) -> Option<(Match, &[Expression])> {
    let [
        Expression::KeyPart { part: KeyPart::Protocol, register: 1 },
        Expression::Compare { equal: true, value: protocol },
        rest @ ..,
    ] = list
    else {
        return None;
    };
    if protocol == &[IPIP] {
        return Some((Match::Encapsulated(Encapsulation::Ipip), rest));
    }
    let [
        Expression::KeyPart { part: KeyPart::Port, register: 1 },
        Expression::Compare { equal: true, value: port },
        Expression::Transport { offset, length },
        Expression::Compare { equal: true, value: vni },
        rest @ ..,
    ] = rest
    else {
        return None;
    };
    let port = Port::new(u16::from_be_bytes(port.as_slice().try_into().ok()?).into()).ok()?;
    let [high, middle, low] = *vni.as_slice() else { return None };
    let vni = Vni::new(u32::from_be_bytes([0, high, middle, low]).into()).ok()?;
    let is_vxlan = protocol == &[UDP] && (*offset, *length) == VNI;
    is_vxlan.then_some((Match::Encapsulated(Encapsulation::Vxlan { port, vni }), rest))
}
