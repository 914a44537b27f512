//! What the Go plugins (containernetworking/plugins) made for one container in the packet filter: found by the names they
//! give, and taken away without them, because `bridge` and `portmap` may be this program by now.
//!
//! To be called at DEL, before the interface goes; the packet filter is to be closed after that, as for rules of our own. Where nothing
//! of the kind is there, a call costs two questions to the kernel for each name and starts no program; only tables of the older
//! iptables, if they are in use, are written with `iptables-legacy`. Twice is once.
//!
//! - the plugin `flannel`: [`remove`], for a container that upstream's plugins made;
//! - the plugin `bridge`: [`remove_masquerade`], if `ipMasq` is asked for;
//! - the plugin `portmap`: [`remove_ports`].

use flannel_core::touch::world::WorldError;
use flannel_core::touch::world::kernel::Netfilter;
use flannel_core::words::digest::sha512_hex;
use flannel_core::words::name::Attachment;
use flannel_core::words::rule::{TableFamily, TableName};

/// Takes away everything here; the answer is the packet filter, to be closed when the interface is gone.
pub(crate) fn remove(network: &str, owner: &Attachment) -> Result<Netfilter, WorldError> {
    let mut filter = Netfilter::open()?;
    remove_masquerade(&mut filter, network, owner)?;
    remove_ports(&mut filter, network, &owner.container)?;
    Ok(filter)
}

/// Takes away how `bridge` and `ptp` masquerade one container: a chain of iptables for the container whatever its interfaces, or rules
/// of nftables for the interface. True if there was something.
pub(crate) fn remove_masquerade(
    filter: &mut Netfilter,
    network: &str,
    owner: &Attachment,
) -> Result<bool, WorldError> {
    let found = filter.remove_foreign_chain(&chain("CNI-", network, &owner.container))?;
    let table = TableName { family: TableFamily::Inet, name: "cni_plugins_masquerade".to_owned() };
    let mark = masquerade_mark(network, owner);
    let rules = filter.remove_foreign_rules(&table, &|comment| comment.starts_with(&mark))?;
    Ok(found || rules > 0)
}

/// Takes away the ports that `portmap` published for a container: its chain, and the second one that versions before 0.7 made; or
/// rules of nftables that have the container's name as their comment. True if there was something.
pub(crate) fn remove_ports(
    filter: &mut Netfilter,
    network: &str,
    container: &str,
) -> Result<bool, WorldError> {
    let mut found = false;
    for prefix in ["CNI-DN-", "CNI-SN-"] {
        found |= filter.remove_foreign_chain(&chain(prefix, network, container))?;
    }
    for family in [TableFamily::Ip, TableFamily::Ip6] {
        let table = TableName { family, name: "cni_hostport".to_owned() };
        found |= filter.remove_foreign_rules(&table, &|comment| comment == container)? > 0;
    }
    Ok(found)
}

/// A name as the Go plugins make it: a prefix and the hash of a text, cut to a length (pkg/utils/utils.go
/// `MustFormatHashWithPrefix`). For chains and interfaces the text is the network's name and the container's.
pub(crate) fn hashed(prefix: &str, length: usize, text: &str) -> String {
    let mut name = format!("{prefix}{}", sha512_hex(text.as_bytes(), 128));
    name.truncate(length);
    name
}

fn chain(prefix: &str, network: &str, container: &str) -> String {
    hashed(prefix, 28, &format!("{network}{container}"))
}

/// How the comment of a masquerading rule of nftables begins; behind it stand the names for people, cut off where it gets long.
fn masquerade_mark(network: &str, owner: &Attachment) -> String {
    let instance = format!("{}:{}", owner.interface, owner.container);
    format!("{}-{},", hashed("", 16, network), hashed("", 16, &instance))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_go_gives() {
        // `printf cbr0g1 | sha512sum | cut -c1-24`, and so on.
        assert_eq!(chain("CNI-", "cbr0", "g1"), "CNI-2108f8318cbddba8c6a5a697");
        assert_eq!(chain("CNI-DN-", "cbr0", "g1"), "CNI-DN-2108f8318cbddba8c6a5a");
        let owner = Attachment { container: "g1".to_owned(), interface: "eth0".to_owned() };
        assert_eq!(masquerade_mark("cbr0", &owner), "cb6e746fae1a4d6c-4eafa962116c567f,");
    }
}
