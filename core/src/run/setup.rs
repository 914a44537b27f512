//! From flags to settings, once for flanneld and for the Docker plugin.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::Context;
use tokio::sync::watch;

use super::cli::{CommonFlags, DEFAULT_ENDPOINTS};
use super::health::Counters;
use super::settings::AgentSettings;
use super::store::etcd::split_endpoints;
use super::store::{EtcdSettings, Store};
use crate::touch::uplink::{Sought, UplinkChoice};
use crate::touch::wireguard_key::KeyPlace;
use crate::words::addr::Prefix;
use crate::words::name::NetworkName;

/// The etcd cluster that the flags name; upstream's default if they name none.
pub fn etcd(flags: &CommonFlags) -> anyhow::Result<Store> {
    let endpoints = split_endpoints(flags.etcd_endpoints.as_deref().unwrap_or(DEFAULT_ENDPOINTS));
    let user = match (&flags.etcd_username, &flags.etcd_password) {
        (Some(name), Some(password)) => Some((name.clone(), password.clone())),
        _ => None,
    };
    let settings = EtcdSettings {
        endpoints,
        prefix: flags.etcd_prefix.clone(),
        cafile: flags.etcd_cafile.clone(),
        certfile: flags.etcd_certfile.clone(),
        keyfile: flags.etcd_keyfile.clone(),
        user,
    };
    Store::etcd(&settings).context("the etcd flags cannot be used")
}

/// The network that flanneld serves with these flags. What of the file's directory is there already counts by its real path.
pub fn flannelds_network(flags: &CommonFlags) -> NetworkName {
    let file = std::path::absolute(&flags.subnet_file).unwrap_or_else(|_| flags.subnet_file.clone());
    let real = file.ancestors().skip(1).find_map(|directory| {
        let rest = file.strip_prefix(directory).ok()?;
        Some(directory.canonicalize().ok()?.join(rest))
    });
    NetworkName::of_subnet_file(&real.unwrap_or(file))
}

/// What an agent of a network is to do, by the flags. It keeps no bridge; whoever wants one says so.
pub fn agent(
    flags: &CommonFlags,
    store: &Store,
    network: NetworkName,
    counters: Counters,
    isolated_from: watch::Receiver<BTreeSet<Prefix>>,
) -> anyhow::Result<AgentSettings> {
    Ok(AgentSettings {
        store: store.network(&network),
        uplink: Sought {
            choice: UplinkChoice::of_flags(&flags.iface, &flags.iface_regex, flags.iface_can_reach),
            public_v4: flags.public_ip,
            public_v6: flags.public_ipv6,
            never: Vec::new(),
        },
        subnet_file: subnet_file(flags, &network),
        state_dir: flags.state_dir.clone(),
        wireguard_key: wireguard_key(flags, &network),
        masquerade: flags.ip_masq,
        fully_random: !flags.ip_masq_fully_random_disable,
        forward: flags.iptables_forward_rules,
        udp_offload: flags.udp_offload,
        guard: flags.tunnel_guard,
        blackhole: flags.ip_blackhole_route,
        allow_extension: flags.allow_extension,
        bridge: None,
        isolated_from,
        exposure: None,
        reads_only: false,
        renew_margin: flags.renew_margin(),
        resync: flags.resync(),
        counters,
        network,
    })
}

/// Where a network's WireGuard key is: upstream's variable and upstream's place count for the default network, the only one it could
/// serve.
fn wireguard_key(flags: &CommonFlags, network: &NetworkName) -> KeyPlace {
    if !network.is_default() {
        return KeyPlace::Kept { upstream: None };
    }
    match std::env::var_os("WIREGUARD_KEY_FILE").filter(|path| !path.is_empty()) {
        Some(path) => KeyPlace::Named(path.into()),
        None => KeyPlace::Kept { upstream: Some(flags.subnet_file.with_file_name("wgkey")) },
    }
}

/// The file that describes a network on this host: the flag's for the default network, `networks/NAME.env` beside it
/// for a named one.
pub fn subnet_file(flags: &CommonFlags, network: &NetworkName) -> PathBuf {
    match network.is_default() {
        true => flags.subnet_file.clone(),
        false => flags.subnet_file.with_file_name("networks").join(format!("{network}.env")),
    }
}
