//! What the packet filter does for one network on this node: keep its traffic from being dropped, give what leaves it the
//! node's address, and keep other networks of the node out.
//!
//! The same for one peer and for thousands, and nothing for a container: rules speak of the network and of our own subnet.
//! A packet between a container here and one elsewhere passes `forward` (accepted, unless a network we are isolated from is
//! at its other end) and returns from `postrtg` with its source kept; one to the outside is masqueraded there.
//!
//! The default network's rules are in upstream's chains, as upstream writes them: of iptables, or with `EnableNFTables` of
//! nftables. A host without the command `iptables` has them in our own table, where those of every other network are, and
//! isolation always.

use std::collections::{BTreeMap, BTreeSet};

use crate::words::addr::{Family, Prefix};
use crate::words::fact::shared_chain::{ChainName, Home, Job, SharedChain};
use crate::words::fact::{Accept, Conflict, Fact, Facts};
use crate::words::name::NetworkName;
use crate::words::node::Iptables;
use crate::words::rule::{
    Base, Chain, ChainKind, Hook, Match, Rule, Set, Side, Table, TableFamily, TableName, Verdict,
};

/// One address family of a network on this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// The whole network.
    pub cidr: Prefix,
    /// The part of it that this node holds.
    pub subnet: Prefix,
}

/// What the rules of one network follow from.
#[derive(Clone, Copy, Debug)]
pub struct FirewallScene<'a> {
    /// Which network.
    pub network: &'a NetworkName,
    /// Its address families, each at most once.
    pub ranges: &'a [Range],
    /// Give what leaves the network the node's address (`--ip-masq`).
    pub masquerade: bool,
    /// Let the kernel choose the source ports of that at random (not with `--ip-masq-fully-random-disable`).
    pub fully_random: bool,
    /// Accept what is forwarded from and to the network (`--iptables-forward-rules`).
    pub forward: bool,
    /// CIDRs of the node's other networks: nothing passes between them and this one.
    pub isolated_from: &'a BTreeSet<Prefix>,
    /// Families whose packets pass a FORWARD chain of iptables here ([`crate::words::node::Node::forward_chains`]).
    pub forward_chains: &'a BTreeSet<Family>,
    /// The iptables of this host.
    pub iptables: &'a Iptables,
    /// The operator wants nftables rather than iptables (`EnableNFTables`).
    pub nftables: bool,
}

impl FirewallScene<'_> {
    /// Where upstream's chains of a family are; none if the rules are in our own table.
    fn home(&self, family: Family) -> Option<Home> {
        match (self.network.is_default(), self.nftables) {
            (false, _) => None,
            (true, true) => Some(Home::Nftables),
            (true, false) => self.iptables.written.get(&family).copied(),
        }
    }

    /// Where forwarded packets have to be accepted in upstream's chains: also wherever they might be dropped, because no
    /// accept outweighs a drop in another table.
    fn accepting(&self, family: Family) -> BTreeSet<Home> {
        let dropping =
            self.iptables.dropping.iter().filter(|(of, _)| *of == family && self.network.is_default());
        self.home(family).into_iter().chain(dropping.map(|(_, home)| *home)).collect()
    }
}

/// Mark of packets that Kubernetes masquerades itself (kube-proxy `--iptables-masquerade-bit` 14).
const KUBE_MARK: u32 = 0x4000;
const FILTER: i32 = 0;
const SRCNAT: i32 = 100;

/// The network's own table. It holds what we want; what it does not hold goes.
pub fn table_name(network: &NetworkName) -> TableName {
    TableName { family: TableFamily::Inet, name: network.table() }
}

/// The facts; none if nothing is asked for.
pub fn plan(scene: &FirewallScene<'_>) -> Result<Facts, Conflict> {
    let mut facts = Facts::default();
    let mut table = Table::new(table_name(scene.network));
    let mut forward = isolation(scene, &mut table.sets);
    let mut postrtg = Vec::new();
    for range in scene.ranges {
        let family = range.cidr.family();
        let home = scene.home(family);
        let chain = |home, job, rules| {
            let name = ChainName { home, family, job };
            Fact::SharedChain(Box::new(SharedChain { name, rules, faults: Vec::new() }))
        };
        if scene.masquerade {
            let knows_random = home != Some(Home::IptablesLegacy) || scene.iptables.fully_random;
            let rules = masquerade(range, scene.fully_random && knows_random);
            match home {
                Some(home) => {
                    let all = std::iter::once(spare_marked()).chain(rules).collect();
                    facts.add(chain(home, Job::Masquerade, all))?;
                }
                None => postrtg.extend(rules),
            }
        }
        if scene.forward {
            let rules = || {
                [Side::Source, Side::Destination]
                    .map(|side| rule(vec![is(side, range.cidr)], Verdict::Accept))
            };
            for home in scene.accepting(family) {
                facts.add(chain(home, Job::Forward, rules().into()))?;
            }
            if home.is_none() {
                forward.extend(rules());
            }
            if !scene.network.is_default() && scene.forward_chains.contains(&family) {
                facts.add(Fact::Accept(Accept { cidr: range.cidr }))?;
            }
        }
    }
    if !postrtg.is_empty() {
        let base = Base { kind: ChainKind::Nat, hook: Hook::Postrouting, priority: SRCNAT };
        postrtg.insert(0, spare_marked());
        table.chains.insert("postrtg".to_owned(), Chain { base: Some(base), rules: postrtg });
    }
    if !forward.is_empty() {
        let base = Base { kind: ChainKind::Filter, hook: Hook::Forward, priority: FILTER };
        table.chains.insert("forward".to_owned(), Chain { base: Some(base), rules: forward });
    }
    if !table.chains.is_empty() {
        facts.add(Fact::Table(Box::new(table)))?;
    }
    Ok(facts)
}

/// What Kubernetes masquerades itself is not ours to masquerade.
fn spare_marked() -> Rule {
    rule(vec![Match::Mark { mask: KUBE_MARK, value: KUBE_MARK }], Verdict::Return)
}

/// Upstream's rules of one family in upstream's order (pkg/trafficmngr/iptables/iptables.go `masqRules`), behind
/// [`spare_marked`].
///
/// The third is iptables', not that of upstream's nftables.go: there it says `saddr != SUBNET daddr CIDR return`, after
/// which the last rule can never match, and what the host sends to a container elsewhere keeps a source that the
/// other node cannot answer.
fn masquerade(range: &Range, fully_random: bool) -> [Rule; 5] {
    use Side::{Destination, Source};
    let masquerade = Verdict::Masquerade { fully_random };
    let Range { cidr, subnet } = *range;
    let multicast = Prefix::multicast(cidr.family());
    [
        rule(vec![is(Source, subnet), is(Destination, cidr)], Verdict::Return),
        rule(vec![is(Source, cidr), is(Destination, subnet)], Verdict::Return),
        rule(vec![is_not(Source, cidr), is(Destination, subnet)], Verdict::Return),
        rule(vec![is(Source, cidr), is_not(Destination, multicast)], masquerade.clone()),
        rule(vec![is_not(Source, cidr), is(Destination, cidr)], masquerade),
    ]
}

/// Drops before any accept, counted so that whoever wonders can see them. A network that overlaps ours is not
/// another one: a rule against it would cut off our own containers.
fn isolation(scene: &FirewallScene<'_>, sets: &mut BTreeMap<String, Set>) -> Vec<Rule> {
    let mut rules = Vec::new();
    for Range { cidr, .. } in scene.ranges {
        let family = cidr.family();
        let others = scene.isolated_from.iter().filter(|other| !other.overlaps(cidr)).copied();
        let set = Set::of(family, others);
        if set.elements.is_empty() {
            continue;
        }
        let name = match family {
            Family::V4 => "isolated",
            Family::V6 => "isolated6",
        };
        for (ours, theirs) in [(Side::Source, Side::Destination), (Side::Destination, Side::Source)] {
            let other = Match::AddressIn { side: theirs, negated: false, family, set: name.to_owned() };
            let matches = vec![is(ours, *cidr), other];
            rules.push(Rule { matches, counter: true, verdict: Verdict::Drop });
        }
        sets.insert(name.to_owned(), set);
    }
    if !rules.is_empty() {
        // Whoever publishes a port of a network publishes it to the others, too.
        let published = vec![Match::Translated { negated: false }];
        rules.insert(0, rule(published, Verdict::Accept));
    }
    rules
}

fn rule(matches: Vec<Match>, verdict: Verdict) -> Rule {
    Rule { matches, counter: false, verdict }
}

fn is(side: Side, prefix: Prefix) -> Match {
    Match::Address { side, negated: false, prefix }
}

fn is_not(side: Side, prefix: Prefix) -> Match {
    Match::Address { side, negated: true, prefix }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::fact::Key;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    /// Plans a network of that name with everything on; `change` turns what the test is about.
    fn planned(
        network: &str,
        ranges: &[(&str, &str)],
        iptables: &Iptables,
        change: impl for<'a> FnOnce(&mut FirewallScene<'a>, &'a BTreeSet<Prefix>),
    ) -> String {
        let network = NetworkName::new(network).unwrap();
        let ranges: Vec<Range> = ranges
            .iter()
            .map(|(cidr, subnet)| Range { cidr: prefix(cidr), subnet: prefix(subnet) })
            .collect();
        let others = ["10.100.5.0/24", "10.200.0.0/16", "10.200.1.0/24", "10.201.0.0/16", "fd00:200::/48"];
        let others = others.map(prefix).into();
        let (alone, chains) = (BTreeSet::new(), BTreeSet::from([Family::V4]));
        let mut scene = FirewallScene {
            network: &network,
            ranges: &ranges,
            masquerade: true,
            fully_random: true,
            forward: true,
            isolated_from: &alone,
            forward_chains: &chains,
            iptables,
            nftables: false,
        };
        change(&mut scene, &others);
        plan(&scene).unwrap().to_string()
    }

    /// A host whose commands write those tables.
    fn iptables(home: Home) -> Iptables {
        let written = [(Family::V4, home), (Family::V6, home)].into();
        Iptables { written, fully_random: true, ..Iptables::default() }
    }

    const V4: (&str, &str) = ("10.100.0.0/16", "10.100.5.0/24");
    const V6: (&str, &str) = ("fd00:100::/48", "fd00:100:0:5::/64");

    #[test]
    fn as_upstream_writes_it_with_iptables() {
        let expected = "\
iptables-nft-restore --noflush '*nat
-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.100.5.0/24 -d 10.100.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.100.0.0/16 -d 10.100.5.0/24 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.100.0.0/16 -d 10.100.5.0/24 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.100.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.100.0.0/16 -d 10.100.0.0/16 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully
COMMIT'
iptables-nft-restore --noflush '*filter
-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.100.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
-A FLANNEL-FWD -d 10.100.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
COMMIT'
";
        assert_eq!(planned("default", &[V4], &iptables(Home::IptablesNft), |_, _| {}), expected);
        let legacy = expected.replace("iptables-nft", "iptables-legacy");
        let mut host = iptables(Home::IptablesLegacy);
        assert_eq!(planned("default", &[V4], &host, |_, _| {}), legacy);
        host.fully_random = false;
        assert_eq!(planned("default", &[V4], &host, |_, _| {}), legacy.replace(" --random-fully", ""));
        // Docker came up with the other variant.
        host.dropping = [(Family::V4, Home::IptablesNft), (Family::V6, Home::IptablesNft)].into();
        let both = planned("default", &[V4], &host, |scene, _| scene.masquerade = false);
        assert_eq!(both.matches("--noflush '*filter\n").count(), 2, "{both}");
    }

    #[test]
    fn as_upstream_writes_it_with_nftables() {
        let expected = "\
nft 'table ip flannel-ipv4 {
	chain postrtg {
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip saddr 10.100.5.0/24 ip daddr 10.100.0.0/16 return
		ip saddr 10.100.0.0/16 ip daddr 10.100.5.0/24 return
		ip saddr != 10.100.0.0/16 ip daddr 10.100.5.0/24 return
		ip saddr 10.100.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.100.0.0/16 ip daddr 10.100.0.0/16 masquerade fully-random
	}
}'
nft 'table ip flannel-ipv4 {
	chain forward {
		type filter hook forward priority filter; policy accept;
		ip saddr 10.100.0.0/16 accept
		ip daddr 10.100.0.0/16 accept
	}
}'
nft 'table ip6 flannel-ipv6 {
	chain postrtg {
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip6 saddr fd00:100:0:5::/64 ip6 daddr fd00:100::/48 return
		ip6 saddr fd00:100::/48 ip6 daddr fd00:100:0:5::/64 return
		ip6 saddr != fd00:100::/48 ip6 daddr fd00:100:0:5::/64 return
		ip6 saddr fd00:100::/48 ip6 daddr != ff00::/8 masquerade fully-random
		ip6 saddr != fd00:100::/48 ip6 daddr fd00:100::/48 masquerade fully-random
	}
}'
nft 'table ip6 flannel-ipv6 {
	chain forward {
		type filter hook forward priority filter; policy accept;
		ip6 saddr fd00:100::/48 accept
		ip6 daddr fd00:100::/48 accept
	}
}'
";
        let text =
            planned("default", &[V4, V6], &iptables(Home::IptablesNft), |scene, _| scene.nftables = true);
        assert_eq!(text, expected);
    }

    #[test]
    fn a_host_without_iptables() {
        let expected = "\
nft 'table inet flannel {
	chain forward {
		type filter hook forward priority filter; policy accept;
		ip saddr 10.100.0.0/16 accept
		ip daddr 10.100.0.0/16 accept
	}
	chain postrtg {
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip saddr 10.100.5.0/24 ip daddr 10.100.0.0/16 return
		ip saddr 10.100.0.0/16 ip daddr 10.100.5.0/24 return
		ip saddr != 10.100.0.0/16 ip daddr 10.100.5.0/24 return
		ip saddr 10.100.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.100.0.0/16 ip daddr 10.100.0.0/16 masquerade fully-random
	}
}'
";
        assert_eq!(planned("default", &[V4], &Iptables::default(), |_, _| {}), expected);
    }

    #[test]
    fn two_families_beside_other_networks() {
        let expected = "\
nft 'table inet flannel-web {
	set isolated { type ipv4_addr; flags interval; elements = { 10.200.0.0/16, 10.201.0.0/16 }; }
	set isolated6 { type ipv6_addr; flags interval; elements = { fd00:200::/48 }; }
	chain forward {
		type filter hook forward priority filter; policy accept;
		ct status dnat accept
		ip saddr 10.100.0.0/16 ip daddr @isolated counter drop
		ip daddr 10.100.0.0/16 ip saddr @isolated counter drop
		ip6 saddr fd00:100::/48 ip6 daddr @isolated6 counter drop
		ip6 daddr fd00:100::/48 ip6 saddr @isolated6 counter drop
		ip saddr 10.100.0.0/16 accept
		ip daddr 10.100.0.0/16 accept
		ip6 saddr fd00:100::/48 accept
		ip6 daddr fd00:100::/48 accept
	}
	chain postrtg {
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip saddr 10.100.5.0/24 ip daddr 10.100.0.0/16 return
		ip saddr 10.100.0.0/16 ip daddr 10.100.5.0/24 return
		ip saddr != 10.100.0.0/16 ip daddr 10.100.5.0/24 return
		ip saddr 10.100.0.0/16 ip daddr != 224.0.0.0/4 masquerade
		ip saddr != 10.100.0.0/16 ip daddr 10.100.0.0/16 masquerade
		ip6 saddr fd00:100:0:5::/64 ip6 daddr fd00:100::/48 return
		ip6 saddr fd00:100::/48 ip6 daddr fd00:100:0:5::/64 return
		ip6 saddr != fd00:100::/48 ip6 daddr fd00:100:0:5::/64 return
		ip6 saddr fd00:100::/48 ip6 daddr != ff00::/8 masquerade
		ip6 saddr != fd00:100::/48 ip6 daddr fd00:100::/48 masquerade
	}
}'
iptables -A FLANNEL-FWD -s 10.100.0.0/16 -j ACCEPT; iptables -A FLANNEL-FWD -d 10.100.0.0/16 -j ACCEPT
";
        let text = planned("web", &[V4, V6], &iptables(Home::IptablesNft), |scene, others| {
            scene.isolated_from = others;
            scene.fully_random = false;
        });
        assert_eq!(text, expected);
    }

    #[test]
    fn isolation_does_not_wait_for_forward_rules() {
        let text = planned("web", &[V4], &iptables(Home::IptablesNft), |scene, others| {
            (scene.masquerade, scene.forward, scene.isolated_from) = (false, false, others);
        });
        assert!(
            text.contains("counter drop")
                && !text.contains("10.100.0.0/16 accept")
                && !text.contains("postrtg"),
            "{text}"
        );
        assert!(!text.contains("FLANNEL-FWD"), "{text}");
    }

    #[test]
    fn nothing_asked_for_is_no_table() {
        let text = planned("web", &[V4], &iptables(Home::IptablesNft), |scene, _| {
            (scene.masquerade, scene.forward) = (false, false)
        });
        assert_eq!(text, "");
    }

    #[test]
    fn every_network_has_a_table_of_its_own() {
        let names = ["default", "web", "a-name-so-long-that-a-table-cannot-have"];
        let tables = names.map(|name| table_name(&NetworkName::new(name).unwrap()));
        assert_eq!(tables[0].to_string(), "inet flannel");
        assert_eq!(tables[1].to_string(), "inet flannel-web");
        assert!(tables[2].name.len() <= 31, "{}", tables[2]);
        let keys: BTreeSet<Key> = tables.into_iter().map(Key::Table).collect();
        assert_eq!(keys.len(), 3);
    }
}
