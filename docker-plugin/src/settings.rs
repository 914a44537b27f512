//! The command line: flanneld's flags and variables, and a few of our own.

use std::path::PathBuf;

use clap::Parser;

use flannel_core::run::cli::{CommonFlags, Environment, Refusal, parse};
use flannel_core::run::setup;
use flannel_core::words::name::NetworkName;

/// Network and IPAM driver for Docker on flannel leases
///
/// Without --etcd-endpoints the leases are kept in a directory (--store-dir): enough for one machine. Other than
/// flanneld, it masquerades what leaves the network unless told --ip-masq=false, as Docker's own networks do.
///
/// Commands for the operator, while it runs: `flannel-docker-plugin status` shows networks, containers and what is wrong;
/// `flannel-docker-plugin network create NAME` types the right `docker network create`. Each has a --help of its own.
#[derive(Parser, Clone, Debug)]
#[command(name = "flannel-docker-plugin", version)]
pub(crate) struct Settings {
    #[command(flatten)]
    pub(crate) common: CommonFlags,

    /// Socket that Docker finds the plugin by; the file's name is the driver's name
    #[arg(long, value_name = "FILE", default_value = DEFAULT_SOCKET)]
    pub(crate) socket: PathBuf,

    /// Directory of the embedded store, used when no etcd endpoints are given [default: STATE-DIR/store]
    #[arg(long, value_name = "DIR")]
    pub(crate) store_dir: Option<PathBuf>,

    /// Directory of the address ledgers, shared with CNI
    #[arg(long, value_name = "DIR", default_value = "/var/lib/cni/networks")]
    pub(crate) ledger_dir: PathBuf,

    /// The name to use after `docker network create -d`, for messages; a managed plugin's has a tag (flannel:latest)
    #[arg(long, value_name = "NAME", default_value = "flannel")]
    pub(crate) driver_name: String,

    /// The engine's API, asked in the background whether networks still exist that were removed while the plugin was away;
    /// if nobody listens there, they stay
    #[arg(long, value_name = "FILE", default_value = "/var/run/docker.sock")]
    pub(crate) docker_socket: PathBuf,

    /// When something is in the way of serving, refuse every call with the reason and try again, instead of exiting: an
    /// engine shows the reason to its user, and does not survive a managed plugin that is gone
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    pub(crate) stay_up: bool,

    /// Remove everything this plugin has made on this host, leave the networks, and exit
    #[arg(long)]
    pub(crate) cleanup: bool,
}

/// Where engines look for the plugin.
pub(crate) const DEFAULT_SOCKET: &str = "/run/docker/plugins/flannel.sock";

/// Whether the environment says `--stay-up`: asked when the settings themselves cannot be read.
pub(crate) fn stays_up(environment: &Environment) -> bool {
    environment.0.get("FLANNELD_STAY_UP").is_some_and(|value| value == "true")
}

impl Settings {
    /// From the command line and the environment.
    pub(crate) fn read(
        arguments: impl IntoIterator<Item = String>,
        mut environment: Environment,
    ) -> Result<Self, Refusal> {
        const MASQUERADE: &str = "FLANNELD_IP_MASQ";
        if environment.0.get(MASQUERADE).is_none_or(String::is_empty) {
            environment.0.insert(MASQUERADE.to_owned(), "true".to_owned());
        }
        parse(arguments, &environment)
    }

    /// Where the embedded store lies, if it is what the leases are kept in.
    pub(crate) fn embedded_store(&self) -> Option<PathBuf> {
        let embedded =
            self.common.etcd_endpoints.as_ref().is_none_or(|endpoints| endpoints.trim().is_empty());
        embedded.then(|| self.store_dir.clone().unwrap_or_else(|| self.common.state_dir.join("store")))
    }

    /// The file that tells others about a network on this node.
    pub(crate) fn subnet_file(&self, network: &NetworkName) -> PathBuf {
        setup::subnet_file(&self.common, network)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn settings(line: &[&str], environment: &[(&str, &str)]) -> Settings {
        let line = ["flannel-docker-plugin"].iter().chain(line).map(|word| (*word).to_owned());
        let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Settings::read(line, Environment(environment)).unwrap()
    }

    #[test]
    fn without_endpoints_the_store_is_a_directory() {
        assert_eq!(settings(&[], &[]).embedded_store(), Some("/var/lib/flannel/store".into()));
        assert_eq!(settings(&["-state-dir=/d"], &[]).embedded_store(), Some("/d/store".into()));
        assert_eq!(settings(&[], &[("FLANNELD_STORE_DIR", "/s")]).embedded_store(), Some("/s".into()));
        assert_eq!(settings(&["--etcd-endpoints=http://a:2379"], &[]).embedded_store(), None);
        assert_eq!(settings(&[], &[("FLANNELD_ETCD_ENDPOINTS", "http://a:2379")]).embedded_store(), None);
    }

    #[test]
    fn docker_networks_masquerade_unless_told_otherwise() {
        assert!(settings(&[], &[]).common.ip_masq);
        assert!(settings(&[], &[("FLANNELD_IP_MASQ", "")]).common.ip_masq);
        assert!(!settings(&["-ip-masq=false"], &[]).common.ip_masq);
        assert!(!settings(&[], &[("FLANNELD_IP_MASQ", "false")]).common.ip_masq);
    }

    #[test]
    fn every_network_has_a_file_of_its_own() {
        let settings = settings(&[], &[]);
        let named = NetworkName::new("web").unwrap();
        assert_eq!(
            settings.subnet_file(&NetworkName::default_network()),
            Path::new("/run/flannel/subnet.env")
        );
        assert_eq!(settings.subnet_file(&named), Path::new("/run/flannel/networks/web.env"));
    }
}
