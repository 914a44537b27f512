//! Upstream's flags and `FLANNELD_*` variables, once; for flanneld and for the Docker plugin.
//!
//! **Shape** — Go's flag syntax: one dash or two, `-x value`, `-x=value`, switches as `-x` or `-x=false`; a variable
//! counts when its flag is not given and it is not empty.
//! **Errors** — a flag of upstream's that is not built yet is refused by name. Bad flags exit with 2 (upstream: 0).
//! **Source** — upstream main.go; pkg/version.

mod go_syntax;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::words::secret::Secret;
use clap::{Args, CommandFactory, FromArgMatches, Parser};

pub use self::go_syntax::Environment;

/// Where etcd is looked for when nobody says.
pub const DEFAULT_ENDPOINTS: &str = "http://127.0.0.1:4001,http://127.0.0.1:2379";

/// Upstream's flags that are not built yet.
const NOT_BUILT: &[&str] = &[
    "iface-regex",
    "iface-can-reach",
    "ip-masq-fully-random-disable",
    "ip-blackhole-route",
    "kube-subnet-mgr",
    "kube-api-url",
    "kubeconfig-file",
    "kube-annotation-prefix",
    "net-config-path",
    "set-node-network-unavailable",
    "vmodule",
    "log_backtrace_at",
];

/// Flags that flanneld and the Docker plugin share.
#[derive(Args, Clone, Debug)]
pub struct CommonFlags {
    /// Comma-separated etcd endpoints
    #[arg(long, value_name = "URLS")]
    pub etcd_endpoints: Option<String>,

    /// Where the network config and the leases live in the store
    #[arg(long, value_name = "PREFIX", default_value = "/coreos.com/network")]
    pub etcd_prefix: String,

    /// Private key of our certificate for etcd
    #[arg(long, value_name = "FILE")]
    pub etcd_keyfile: Option<PathBuf>,

    /// Our certificate for etcd
    #[arg(long, value_name = "FILE")]
    pub etcd_certfile: Option<PathBuf>,

    /// Authority that signed etcd's certificate
    #[arg(long, value_name = "FILE")]
    pub etcd_cafile: Option<PathBuf>,

    /// User name for etcd
    #[arg(long, value_name = "NAME")]
    pub etcd_username: Option<String>,

    /// Password for etcd; better given as FLANNELD_ETCD_PASSWORD
    #[arg(long, value_name = "PASSWORD", value_parser = |text: &str| Ok::<_, String>(Secret::new(text.to_owned())))]
    pub etcd_password: Option<Secret<String>>,

    /// Interface to reach the other hosts by, by name or by address; the first that exists is taken
    #[arg(long, value_name = "NAME|IP")]
    pub iface: Vec<String>,

    /// Address at which the other hosts reach this one
    #[arg(long, value_name = "IP")]
    pub public_ip: Option<Ipv4Addr>,

    /// The same for IPv6, in a network with EnableIPv6
    #[arg(long, value_name = "IP", value_parser = go_syntax::parse_public_ipv6)]
    pub public_ipv6: Option<Ipv6Addr>,

    /// File that tells others (CNI, scripts) the subnet, the MTU and whether we masquerade
    #[arg(long, value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    pub subnet_file: PathBuf,

    /// Minutes before its end at which the lease is renewed
    #[arg(long, value_name = "MINUTES", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..1440))]
    pub subnet_lease_renew_margin: u32,

    /// Masquerade traffic that leaves the network
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", value_parser = go_syntax::parse_bool)]
    pub ip_masq: bool,

    /// Accept forwarded traffic from and to the network
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", value_parser = go_syntax::parse_bool)]
    pub iptables_forward_rules: bool,

    /// Seconds between two looks at the kernel when it reports no change (changes are repaired at once)
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..86_400))]
    pub iptables_resync: u32,

    /// Move packets of the udp backend in batches and large pieces; false: one packet for each system call
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", value_parser = go_syntax::parse_bool)]
    pub udp_offload: bool,

    /// Address of the health server
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub healthz_ip: IpAddr,

    /// Port of the health server (/healthz, /readyz, /metrics); 0 is off
    #[arg(long, value_name = "PORT", default_value_t = 0, allow_negative_numbers = true)]
    pub healthz_port: i32,

    /// Directory for what must survive a restart
    #[arg(long, value_name = "DIR", default_value = "/var/lib/flannel")]
    pub state_dir: PathBuf,

    /// How much is logged: 0 what changes, 1 why, 4 everything
    #[arg(long = "v", value_name = "LEVEL", default_value_t = 0)]
    pub verbosity: u8,
}

impl CommonFlags {
    /// How long before its end the lease is renewed.
    pub fn renew_margin(&self) -> Duration {
        Duration::from_secs(u64::from(self.subnet_lease_renew_margin) * 60)
    }

    /// How long without any notice from the kernel before it is looked at all the same.
    pub fn resync(&self) -> Duration {
        Duration::from_secs(u64::from(self.iptables_resync))
    }

    /// Where the health server listens, if at all.
    pub fn health_address(&self) -> Option<std::net::SocketAddr> {
        let port = u16::try_from(self.healthz_port).ok().filter(|port| *port > 0)?;
        Some((self.healthz_ip, port).into())
    }
}

/// Reads the command line and the environment. On `--help`, `--version` and on errors the answer is the text for the
/// operator and the exit status.
pub fn parse<P: Parser + CommandFactory + FromArgMatches>(
    arguments: impl IntoIterator<Item = String>,
    environment: &Environment,
) -> Result<P, Refusal> {
    let command = P::command().after_help(AFTER_HELP);
    let arguments = go_syntax::normalize(arguments, environment, &command, NOT_BUILT).map_err(|text| {
        Refusal { text: format!("{}: {text}\n\nTry --help.\n", command.get_name()), status: 2 }
    })?;
    let matches = command.try_get_matches_from(arguments.line).map_err(|error| {
        let status = if error.use_stderr() { 2 } else { 0 };
        let from = match arguments.from_environment.is_empty() || status == 0 {
            true => String::new(),
            false => format!("\nTaken from the environment: {}\n", arguments.from_environment.join(", ")),
        };
        Refusal { text: format!("{error}{from}"), status }
    })?;
    P::from_arg_matches(&matches).map_err(|error| Refusal { text: error.to_string(), status: 2 })
}

const AFTER_HELP: &str = "Flags may be written with one dash or two, and each may be given as a variable instead: \
    --etcd-prefix is FLANNELD_ETCD_PREFIX.";

/// Why the program does not start.
#[derive(Debug)]
pub struct Refusal {
    /// For the operator.
    pub text: String,
    /// Exit status.
    pub status: u8,
}

impl Refusal {
    /// Says it: what was asked for (help, version) to stdout, what is wrong to stderr.
    pub fn exit(self) -> ExitCode {
        use std::io::Write;
        // Nobody is left to be told if this fails.
        let _ = match self.status {
            0 => write!(std::io::stdout(), "{}", self.text),
            _ => write!(std::io::stderr(), "{}", self.text),
        };
        ExitCode::from(self.status)
    }
}

/// Starts logging to stderr. `RUST_LOG` outweighs the level.
pub fn start_logging(verbosity: u8) {
    let level = match verbosity {
        0 => "info",
        1..=3 => "flannel_core=debug,flanneld=debug,flannel_docker_plugin=debug,info",
        _ => "flannel_core=trace,flanneld=trace,flannel_docker_plugin=trace,debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
}
