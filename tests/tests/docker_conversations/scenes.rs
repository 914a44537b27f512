//! What users do with one engine, as lists of commands; recorded with a real one, replayed without.

/// One thing that happens.
#[derive(Debug, Clone, Copy)]
pub(super) enum Act {
    /// `docker …` that succeeds. `LEASE.` stands for the first three bytes of this host's subnet of the default network.
    Docker(&'static str),
    /// `docker …` that is refused, by the plugin or by the engine.
    Refused(&'static str),
    /// `docker-compose …` in the directory with [`COMPOSE`].
    Compose(&'static str),
    /// SIGTERM to the engine, and another start.
    RestartEngine,
    /// SIGKILL to the engine, and another start.
    CrashEngine,
}

/// Acts on one host, and what is in the engine's daemon.json.
pub(super) struct Scene {
    pub(super) name: &'static str,
    pub(super) daemon: &'static str,
    pub(super) acts: &'static [Act],
}

use Act::{Compose, CrashEngine, Docker, Refused, RestartEngine};

/// Two services on a network of the user's, one of them with a fixed address; and the driver for compose's default network.
pub(super) const COMPOSE: &str = r#"version: "2.4"
services:
  one:
    image: lab
    command: sleep infinity
    mac_address: "02:42:aa:bb:cc:dd"
    networks: {web: {aliases: [uno], ipv4_address: LEASE.50}}
  two:
    image: lab
    command: sleep infinity
    networks: [web, default]
networks:
  web:
    driver: flannel
    ipam: {driver: flannel, config: [{subnet: 10.100.0.0/16}]}
    labels: {a: b}
  default:
    driver: flannel
    driver_opts: {com.docker.network.driver.mtu: "1400"}
    ipam: {driver: flannel, options: {network: second}, config: [{subnet: 10.60.0.0/16}]}
"#;

const CREATE: Act = Docker("network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 web");

pub(super) const SCENES: &[Scene] = &[
    Scene {
        name: "networks",
        daemon: "{}",
        acts: &[
            // The first stays, so that the lease does.
            CREATE,
            Docker("network inspect web"),
            Docker("network create -d flannel --ipam-driver flannel automatic"),
            Docker("network rm automatic"),
            Docker("network create -d flannel --ipam-driver flannel --ipam-opt network=default named"),
            Docker("network rm named"),
            Docker(
                "network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 --gateway LEASE.1 gateway",
            ),
            Docker("network rm gateway"),
            Docker(
                "network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 --ip-range LEASE.128/25 range",
            ),
            Docker("network rm range"),
            Docker(
                "network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 --aux-address router=LEASE.5 --aux-address dns=LEASE.6 aux",
            ),
            Docker("network rm aux"),
            Docker(
                "network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 --label a=b --attachable labelled",
            ),
            Docker("network rm labelled"),
            Docker(
                "network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 -o com.docker.network.driver.mtu=1400 options",
            ),
            Docker("network rm options"),
            Docker(
                "network create -d flannel --ipam-driver flannel --subnet 10.60.0.0/16 --ipam-opt network=second --ipam-opt backend=vxlan second",
            ),
            Docker("network rm second"),
            Docker("network create -d flannel --ipam-driver null -o flannel.network=default null"),
            Docker("run --rm --network null lab true"),
            Docker("network rm null"),
            Docker("network create -d flannel --subnet LEASE.0/24 engines"),
            Docker("run --rm --network engines lab true"),
            Docker("network rm engines"),
            Docker("network create --config-only --ipam-driver flannel --subnet 10.100.0.0/16 config"),
            Docker("network create -d flannel --config-from config from"),
            Docker("network rm from"),
            Docker("network rm config"),
            Refused("network create -d flannel wrong"),
            Refused("network create -d flannel --ipam-driver flannel --subnet 10.0.0.0/8 wrong"),
            Refused(
                "network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 -o colour=red wrong",
            ),
            Refused(
                "network create -d flannel --ipam-driver flannel --subnet 10.9.0.0/16 --ipam-opt colour=red wrong",
            ),
            Refused(
                "network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 --ip-range 10.99.0.0/24 wrong",
            ),
            Docker("network ls"),
            Docker("network prune -f"),
        ],
    },
    Scene {
        name: "run",
        daemon: "{}",
        acts: &[
            CREATE,
            Docker("run --rm --network web --name c1 lab true"),
            Docker("run --rm --network web --expose 7000 --expose 7001/udp lab true"),
            Docker(
                "run --rm --network web --network-alias a --network-alias b --hostname h --dns 9.9.9.9 --label x=y lab true",
            ),
            Docker("run --rm --network web --sysctl net.ipv4.ip_forward=1 lab true"),
            Docker("run --rm --network web -p 18080:80 -p 127.0.0.1:19000-19001:90-91/udp -p 1234 lab true"),
            Docker("create --name created --network web lab true"),
            Docker("start created"),
            Docker("rm -f created"),
            Docker("run -d --name c2 --network web lab sleep 1000"),
            Docker("ps"),
            Docker("port c2"),
            Docker("inspect c2"),
            Docker("network inspect -v web"),
            Docker("exec c2 true"),
            Docker("volume ls"),
            Docker("system df"),
            Docker("info"),
            Refused("run --rm --network web lab no-such-program"),
            Refused("network rm web"),
            Docker("rm -f c2"),
            Docker("network rm web"),
        ],
    },
    Scene {
        name: "addresses",
        daemon: "{}",
        acts: &[
            CREATE,
            Docker("run --rm --network web --ip LEASE.77 lab true"),
            Docker("run --rm --network name=web,ip=LEASE.90,alias=z,link-local-ip=169.254.5.5 lab true"),
            Docker("run -d --name c1 --network web --ip LEASE.50 lab sleep 1000"),
            Refused("run --rm --network web --ip LEASE.50 lab true"),
            Refused("run --rm --network web --ip LEASE.1 lab true"),
            Refused("run --rm --network web --ip 10.9.9.9 lab true"),
            Refused("run --rm --network name=web,driver-opt=colour=red lab true"),
            Docker("rm -f c1"),
            Docker("run --rm --network web --ip LEASE.50 lab true"),
            Docker("network create -d flannel --ipam-driver null -o flannel.network=default null"),
            Docker("run --rm --network name=null,driver-opt=flannel.ip=LEASE.60 lab true"),
            Docker("network rm null"),
            Docker("network rm web"),
        ],
    },
    Scene {
        name: "connect",
        daemon: "{}",
        acts: &[
            CREATE,
            Docker("network create -d flannel --ipam-driver flannel --subnet 10.60.0.0/16 other"),
            Docker("run -d --name c1 --network web lab sleep 1000"),
            Docker("network connect other c1"),
            Refused("network connect other c1"),
            Docker("network disconnect web c1"),
            Docker("network connect --ip LEASE.44 --alias x web c1"),
            Docker("network disconnect -f other c1"),
            Docker("run -d --name c2 lab sleep 1000"),
            Docker("network connect web c2"),
            Docker("network disconnect bridge c2"),
            Docker("create --name c3 --network web lab sleep 1000"),
            Docker("network connect other c3"),
            Docker("start c3"),
            Docker("stop -t 0 c3"),
            Docker("network disconnect other c3"),
            Docker("rm -f c1 c2 c3"),
            Docker("network rm web other"),
        ],
    },
    Scene {
        name: "lifecycle",
        daemon: "{}",
        acts: &[
            CREATE,
            Docker("run -d --name c1 --network web lab sleep 1000"),
            Docker("run -d --name c2 --network web lab sleep 1000"),
            Docker("exec c1 ping -c 1 -W 2 c2"),
            Docker("stop -t 0 c1"),
            Docker("start c1"),
            Docker("restart -t 0 c1"),
            Docker("kill c1"),
            Docker("start c1"),
            Docker("pause c1"),
            Docker("unpause c1"),
            Docker("rename c1 cc"),
            Docker("commit cc image"),
            Docker("rmi image"),
            Docker("update --restart no cc"),
            Docker("rm -f cc"),
            Docker("stop -t 0 c2"),
            Docker("container prune -f"),
            Docker("network prune -f"),
        ],
    },
    Scene {
        name: "restart",
        daemon: "{}",
        acts: &[
            CREATE,
            Docker("run -d --name c1 --restart always --network web --ip LEASE.99 lab sleep 1000"),
            Docker("run -d --name c2 --restart always --network web lab sleep 1000"),
            Docker("run -d --name c3 --network web lab sleep 1000"),
            RestartEngine,
            Docker("ps -a"),
            Docker("start c3"),
            CrashEngine,
            Docker("ps -a"),
            Docker("rm -f c1 c2 c3"),
            Docker("network rm web"),
        ],
    },
    Scene {
        name: "live-restore",
        daemon: r#"{"live-restore": true}"#,
        acts: &[
            CREATE,
            Docker("run -d --name c1 --network web lab sleep 1000"),
            RestartEngine,
            Docker("run -d --name c2 --network web lab sleep 1000"),
            CrashEngine,
            Docker("network inspect web"),
            Docker("stop -t 0 c1"),
            Docker("start c1"),
            Docker("rm -f c1 c2"),
            Docker("network rm web"),
        ],
    },
    Scene {
        name: "compose",
        daemon: "{}",
        acts: &[
            // The lease's address is in the file: something has to hold it before.
            Docker("network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 holder"),
            Compose("up -d"),
            Compose("ps"),
            Compose("up -d --scale two=3"),
            Compose("restart -t 0"),
            Compose("down -t 0"),
            Docker("network rm holder"),
        ],
    },
];
