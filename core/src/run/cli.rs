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

use crate::touch::uplink::{Pattern, Wanted};
use crate::words::secret::Secret;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

pub use self::go_syntax::Environment;

/// Where etcd is looked for when nobody says.
pub const DEFAULT_ENDPOINTS: &str = "http://127.0.0.1:4001,http://127.0.0.1:2379";

const KUBE: &str =
    "belongs to the Kubernetes store, which is not built yet in this version; leases live in etcd";
const KLOG: &str = "names source files of the Go program; here -v LEVEL or RUST_LOG=flannel_core::run=debug says what is logged";

const MANY: &str = "served several networks with one flanneld, up to 0.7; start one for each, with an --etcd-prefix and a --subnet-file of its own";
const REMOTE: &str = "belongs to the client and server of flannel up to 0.7; every flanneld asks etcd itself now (--etcd-endpoints)";
const GLOG: &str = "says where the Go program logs; the log goes to stderr here, and -v LEVEL says how much";

/// Upstream's flags that are refused, and why.
const REFUSED: &[(&str, &str)] = &[
    ("kube-subnet-mgr", KUBE),
    ("kube-api-url", KUBE),
    ("kubeconfig-file", KUBE),
    ("kube-annotation-prefix", KUBE),
    ("net-config-path", KUBE),
    ("set-node-network-unavailable", KUBE),
    ("use-multi-cluster-cidr", KUBE),
    ("vmodule", KLOG),
    ("log_backtrace_at", KLOG),
    ("logtostderr", GLOG),
    ("alsologtostderr", GLOG),
    ("stderrthreshold", GLOG),
    ("log_dir", GLOG),
    ("networks", MANY),
    ("watch-networks", MANY),
    ("subnet-dir", MANY),
    ("listen", REMOTE),
    ("remote", REMOTE),
    ("remote-keyfile", REMOTE),
    ("remote-certfile", REMOTE),
    ("remote-cafile", REMOTE),
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
    #[arg(long, value_name = "FILE", requires = "etcd_certfile")]
    pub etcd_keyfile: Option<PathBuf>,

    /// Our certificate for etcd
    #[arg(long, value_name = "FILE", requires = "etcd_keyfile")]
    pub etcd_certfile: Option<PathBuf>,

    /// Authority that signed etcd's certificate; for https without it, the system's
    #[arg(long, value_name = "FILE")]
    pub etcd_cafile: Option<PathBuf>,

    /// User name for etcd
    #[arg(long, value_name = "NAME", requires = "etcd_password")]
    pub etcd_username: Option<String>,

    /// Password for etcd; better given as FLANNELD_ETCD_PASSWORD
    #[arg(long, value_name = "PASSWORD", requires = "etcd_username", value_parser = |text: &str| Ok::<_, String>(Secret::new(text.to_owned())))]
    pub etcd_password: Option<Secret<String>>,

    /// Interface to reach the other hosts by, by name or by address. May be repeated: the first that exists and has an
    /// address is taken. Without this and the next two flags: the interface that has --public-ip, else that of the default
    /// route
    #[arg(long, value_name = "NAME|IP")]
    pub iface: Vec<Wanted>,

    /// Expression (RE2, unanchored) for the interface's address or name, after --iface. May be repeated
    #[arg(long, value_name = "REGEX", value_parser = go_syntax::parse_pattern)]
    pub iface_regex: Vec<Pattern>,

    /// Take the interface, and the source address, by which packets to this address leave; after --iface-regex
    #[arg(long, value_name = "IP")]
    pub iface_can_reach: Option<IpAddr>,

    /// Address at which the other hosts reach this one
    #[arg(long, value_name = "IP", value_parser = go_syntax::parse_public_ip)]
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

    /// Let the kernel keep source ports where it can when it masquerades, instead of choosing them at random
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", value_parser = go_syntax::parse_bool)]
    pub ip_masq_fully_random_disable: bool,

    /// Accept forwarded traffic from and to the network
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", value_parser = go_syntax::parse_bool)]
    pub iptables_forward_rules: bool,

    /// Take VXLAN and IPIP packets from hosts only that hold a lease; whoever else sends into the tunnel is dropped and counted
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", value_parser = go_syntax::parse_bool)]
    pub tunnel_guard: bool,

    /// Throw away what is sent to this host's subnet while no bridge of it is up, instead of sending it back where it came from
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", value_parser = go_syntax::parse_bool)]
    pub ip_blackhole_route: bool,

    /// Seconds between two looks at the kernel when it reports no change (changes are repaired at once)
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..86_400))]
    pub iptables_resync: u32,

    /// Move packets of the udp backend in batches and large pieces; false: one packet for each system call
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", value_parser = go_syntax::parse_bool)]
    pub udp_offload: bool,

    /// Run the commands of the extension backend, which whoever can write the network config chooses; they run as root
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", value_parser = go_syntax::parse_bool)]
    pub allow_extension: bool,

    /// Address of the health server
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub healthz_ip: IpAddr,

    /// Port of the health server (/healthz, /readyz, /metrics); 0 is off
    #[arg(long, value_name = "PORT", default_value_t = 0, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(..=65_535))]
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

/// The process's own arguments, its name first.
pub fn arguments() -> Result<Vec<String>, Refusal> {
    let text = |argument: std::ffi::OsString| {
        argument.into_string().map_err(|argument| Refusal {
            text: format!("{} is not text in UTF-8\n\nTry --help.\n", argument.display()),
            status: 2,
        })
    };
    std::env::args_os().map(text).collect()
}

/// Reads the command line and the environment. On `--help`, `--version` and on errors the answer is the text for the
/// operator and the exit status.
pub fn parse<P: Parser + CommandFactory + FromArgMatches>(
    arguments: impl IntoIterator<Item = String>,
    environment: &Environment,
) -> Result<P, Refusal> {
    // As with Go, the last of several counts: a unit's own flags may be followed by an operator's.
    let command = P::command().after_help(AFTER_HELP).args_override_self(true);
    let arguments = go_syntax::normalize(arguments, environment, &command, REFUSED).map_err(|text| {
        Refusal { text: format!("{}: {text}\n\nTry --help.\n", command.get_name()), status: 2 }
    })?;
    for variable in &arguments.unread {
        // Before there is a log; whoever misspelt it finds it among the first lines.
        eprintln!("{}: {variable} is set, and nothing reads it", command.get_name());
    }
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

/// The command line of flanneld.
#[derive(Parser, Debug)]
#[command(
    name = "flanneld",
    version,
    about = "Leases this host a subnet of a flannel network and makes the kernel carry its packets to the other hosts",
    subcommand_negates_reqs = true,
    disable_help_subcommand = true
)]
pub struct FlanneldFlags {
    /// Flags.
    #[command(flatten)]
    pub common: CommonFlags,

    /// Remove everything that flannel made on this host (devices, routes, rules, files, lease), and end
    #[arg(long)]
    pub cleanup: bool,

    /// What to do instead of serving.
    #[command(subcommand)]
    pub errand: Option<Errand>,
}

/// What flanneld does besides serving. Flags, those for etcd for example, come before it or are variables.
#[derive(Subcommand, Clone, Debug)]
pub enum Errand {
    /// Print the completions of a shell; for bash: source <(flanneld completions bash)
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Say who serves the network on this host, with which subnet; status 1 if nobody does
    Status,
    /// List the leases of the network, this host's marked with a star
    Leases,
    /// Show what the next pass would change on this host, given the same flags and variables as the daemon; status 1 if anything
    Plan,
    /// Say where this host's packets to an address go, and what the kernel has for it; status 1 if nowhere
    Explain {
        /// An address of a container, for example
        address: IpAddr,
    },
}

/// The completions of a shell for flanneld, as its script.
pub fn completions(shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut FlanneldFlags::command(), "flanneld", &mut script);
    script
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
        // What boringtun calls errors are peers that are away; who is silent is told as a finding.
        0 => "info,boringtun=off",
        1..=3 => "flannel_core=debug,flanneld=debug,flannel_docker_plugin=debug,info,boringtun=off",
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The page follows from the flags. `UPDATE_MAN=1 cargo nextest run -p flannel-core the_manual_page` writes it anew.
    #[test]
    fn the_manual_page_is_what_the_flags_are() {
        let mut page = Vec::new();
        let command = FlanneldFlags::command().after_help(AFTER_HELP);
        clap_mangen::Man::new(command).section("8").render(&mut page).unwrap();
        let page = String::from_utf8(page).unwrap();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/man/flanneld.8");
        if std::env::var_os("UPDATE_MAN").is_some() {
            std::fs::write(path, &page).unwrap();
        }
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            written == page,
            "docs/man/flanneld.8 is not what the flags are; write it anew with UPDATE_MAN=1"
        );
        for flag in FlanneldFlags::command().get_arguments().filter_map(|argument| argument.get_long()) {
            assert!(page.contains(&flag.replace('-', "\\-")), "{flag}");
        }
    }

    #[test]
    fn shells_complete_every_flag() {
        use clap_complete::Shell;
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = String::from_utf8(completions(shell)).unwrap();
            for flag in FlanneldFlags::command().get_arguments().filter_map(|argument| argument.get_long()) {
                assert!(script.contains(flag), "{shell}: {flag}");
            }
        }
    }

    #[test]
    fn an_errand_goes_with_the_environment() {
        let environment = Environment([("FLANNELD_ETCD_PREFIX".to_owned(), "/env".to_owned())].into());
        let line = ["flanneld", "completions", "bash"].map(str::to_owned);
        let flags: FlanneldFlags = parse(line, &environment).unwrap();
        assert_eq!(flags.common.etcd_prefix, "/env");
        assert!(matches!(flags.errand, Some(Errand::Completions { shell: clap_complete::Shell::Bash })));
        // Nothing that a variable could have left behind takes everything away.
        let environment = Environment([("FLANNELD_CLEANUP".to_owned(), "true".to_owned())].into());
        let flags: FlanneldFlags = parse(["flanneld".to_owned()], &environment).unwrap();
        assert!(!flags.cleanup);
    }
}
