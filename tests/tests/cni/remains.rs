//! What a node still has of its containers: the one measure of "nothing is left behind".

use anyhow::{Result, ensure};
use flannel_tests::{eventually, secs};
use serde_json::{Value, json};

use crate::node::{Node, with};

/// Everything a container can have of us: ports, limits, masquerading.
pub(crate) fn rich() -> Value {
    let conf = with(&Node::conf(), "cniVersion", json!("1.1.0"));
    let ports = json!([{ "HostPort": 18080, "ContainerPort": 80, "Protocol": "tcp" },
                       { "HostPort": 18053, "ContainerPort": 53, "Protocol": "udp" }]);
    let limits = json!({ "IngressRate": 20_000_000, "IngressBurst": 4_294_967_295_u64,
                         "EgressRate": 20_000_000, "EgressBurst": 4_294_967_295_u64 });
    with(&conf, "runtimeConfig", json!({ "portMappings": ports, "bandwidth": limits }))
}

/// What is left of an ADD that was undone, beside what the network keeps (bridge, table, lock, markers).
pub(crate) struct Remains(String);

/// Links, addresses, routes and rules of the node; what shapes traffic; ledger, scratch and state files; what is in the namespaces.
pub(crate) fn look(node: &Node<'_>) -> Result<String> {
    let host = node.host;
    // A bridge without ports loses its carrier a moment later; that is nobody's doing.
    let carrier = [" linkdown", "NO-CARRIER,", ",LOWER_UP"];
    let network = carrier.iter().fold(host.network_state()?, |state, part| state.replace(part, ""));
    // Made by the kernel when a port comes up, and kept as long as it likes.
    let network: Vec<&str> = network.lines().filter(|line| !line.contains("fe80::")).collect();
    let files = host.sh(
        // One lock and one draft are the network's, however many containers it has.
        "find /var/lib/cni /run/flannel -mindepth 1 ! -type d 2>/dev/null | grep -v -e /last_reserved_ip -e '/lock$' -e '/\\.draft$' \
         -e '/\\.lock$' -e /boot_id -e /subnet -e '/results/' | sort; tc qdisc show | grep -v -e noqueue -e 'dev eth0' || true; ip -o link show type ifb; \
         for ns in $(ip netns list | cut -d' ' -f1); do echo \"$ns: $(ip -n $ns -o link 2>/dev/null | cut -d: -f2 | xargs)\"; done",
    )?;
    Ok(format!("{}\n--- files, shaping, namespaces\n{files}", network.join("\n")))
}

impl Remains {
    /// What there is before.
    pub(crate) fn before(node: &Node<'_>) -> Result<Self> {
        // Whatever the network makes for the first container is the network's.
        node.container("first")?;
        node.add("first", &rich())?;
        node.del("first", &rich())?;
        node.host.sh("ip netns del first")?;
        Self::now(node)
    }

    /// What there is now.
    pub(crate) fn now(node: &Node<'_>) -> Result<Self> {
        Ok(Self(look(node)?))
    }

    /// That there is nothing more, and nothing less, than before. The kernel may take a moment to clear what was deleted.
    pub(crate) fn are_none(&self, node: &Node<'_>, what: &str) -> Result<()> {
        eventually(format!("nothing is left after {what}"), secs(10), || {
            let now = look(node)?;
            let lines =
                |text: &str| text.lines().map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
            let (before, after) = (lines(&self.0), lines(&now));
            let (more, less): (Vec<_>, Vec<_>) =
                (after.difference(&before).collect(), before.difference(&after).collect());
            ensure!(more.is_empty() && less.is_empty(), "more: {more:#?}\nless: {less:#?}");
            Ok(())
        })
    }
}
