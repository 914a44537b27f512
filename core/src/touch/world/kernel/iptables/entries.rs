//! What the kernel has in a table of x_tables, as bytes: enough to see that nothing has changed, without running a command.

use std::os::fd::{AsRawFd, RawFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::words::addr::Family;

/// IPT_SO_GET_INFO and IP6T_SO_GET_INFO (uapi/linux/netfilter_ipv4/ip_tables.h).
const GET_INFO: libc::c_int = 64;
/// IPT_SO_GET_ENTRIES and IP6T_SO_GET_ENTRIES.
const GET_ENTRIES: libc::c_int = 65;
/// `struct ipt_getinfo`: name, hooks, entry points, underflows, number of entries, their size.
const INFO: usize = 84;
const INFO_SIZE: usize = 80;
/// `struct ipt_get_entries` before the entries: name, size, padding.
const HEAD: usize = 40;
const NAME: usize = 32;
/// Nobody's table is larger; a host with more is read by the command each time.
const SIZE_MAX: usize = 64 << 20;

/// The entries of a table that is in use, less their counters; none if the kernel does not tell (then it is as if they had
/// changed).
pub(super) fn read(family: Family, table: &str) -> Option<Vec<u8>> {
    let (address_family, level) = match family {
        Family::V4 => (AddressFamily::Inet, libc::SOL_IP),
        Family::V6 => (AddressFamily::Inet6, libc::SOL_IPV6),
    };
    // Of whatever kind: the tables are asked about before the protocol is.
    let fd = socket(address_family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).ok()?;
    let mut info = [0; INFO];
    name_into(&mut info, table)?;
    get(fd.as_raw_fd(), (level, GET_INFO), &mut info)?;
    let size = u32::from_ne_bytes(*info.get(INFO_SIZE..)?.first_chunk()?) as usize;
    if size > SIZE_MAX {
        return None;
    }
    let mut entries = vec![0; HEAD + size];
    name_into(&mut entries, table)?;
    entries.get_mut(NAME..NAME + 4)?.copy_from_slice(&(size as u32).to_ne_bytes());
    get(fd.as_raw_fd(), (level, GET_ENTRIES), &mut entries)?;
    entries.drain(..HEAD);
    without_counters(family, &mut entries)?;
    Some(entries)
}

fn name_into(bytes: &mut [u8], name: &str) -> Option<()> {
    bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
    Some(())
}

/// Fills `bytes`, which begin with the question; none unless the answer is as long.
#[expect(unsafe_code, reason = "options that no safe interface has")]
fn get(fd: RawFd, (level, option): (libc::c_int, libc::c_int), bytes: &mut [u8]) -> Option<()> {
    let mut length = bytes.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into the buffer, which is that long, and the answer's length into `length`.
    let result = unsafe { libc::getsockopt(fd, level, option, bytes.as_mut_ptr().cast(), &raw mut length) };
    (result == 0 && length as usize == bytes.len()).then_some(())
}

/// Counters are the last 16 bytes of `struct ipt_entry` (112 bytes) and `struct ip6t_entry` (168 bytes); where the next entry is,
/// `next_offset` says, 4 + 2 bytes before `comefrom` and its padding.
fn without_counters(family: Family, entries: &mut [u8]) -> Option<()> {
    let (next_offset, length) = match family {
        Family::V4 => (90, 112),
        Family::V6 => (142, 168),
    };
    let mut rest = entries;
    while !rest.is_empty() {
        let next = usize::from(u16::from_ne_bytes(*rest.get(next_offset..)?.first_chunk()?));
        rest.get_mut(length - 16..length)?.fill(0);
        // No entry is shorter than its header.
        rest = rest.get_mut(next.max(length)..)?;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_no_change() {
        for (family, next, length) in [(Family::V4, 90, 112), (Family::V6, 142, 168)] {
            let entry = |counter: u8| {
                let mut entry = vec![7; length + 40];
                entry[next..next + 2].copy_from_slice(&(length as u16 + 40).to_ne_bytes());
                entry[length - 16..length].fill(counter);
                entry
            };
            let (mut one, mut other) = ([entry(1), entry(2)].concat(), [entry(3), entry(4)].concat());
            assert!(one != other);
            assert_eq!(
                (without_counters(family, &mut one), without_counters(family, &mut other)),
                (Some(()), Some(()))
            );
            assert_eq!(one, other);
            assert_eq!(without_counters(family, &mut one[..length + 50]), None, "cut off");
        }
    }
}
