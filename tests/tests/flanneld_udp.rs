//! flanneld's udp backend on real hosts: what it leaves in etcd and the kernel, what it carries and what it does not, and who
//! comes and goes.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, Pod, SubnetEnv, leases, put_config};
use flannel_tests::{
    Daemon, Host, HttpServer, Lab, Place, Signal, eventually, http_get, in_lab, largest_packet, ping,
    ping_within, secs, unchanged,
};

const UDP: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"udp"}}"#;
const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// How long until a change is everywhere.
const FOLLOW: Duration = Duration::from_secs(10);

/// A text that is nowhere like itself, so that a piece in the wrong place shows.
fn long_text() -> String {
    (0..400_000u32).map(|n| format!("{n:x}.")).collect()
}

fn pods(lab: &Lab) -> Result<Vec<Pod>> {
    lab.hosts().iter().map(|host| Pod::new(host, &SubnetEnv::read(host)?, 2)).collect()
}

/// Large TCP segments in both directions, byte for byte.
fn carries_text(from: &Pod, to: &Pod, text: &str) -> Result<()> {
    let server = HttpServer::start(to, 8000, text)?;
    let come = eventually("the text arrives", FOLLOW, || {
        http_get(from, format!("http://{}:8000/", to.ip()).as_str())
    })?;
    ensure!(come == text, "{} bytes came of {}", come.len(), text.len());
    server.stop()
}

/// The largest packet that passes. A slow machine may lose one that should have.
fn carries_exactly(from: &Pod, to: &Pod, bytes: u32) -> Result<()> {
    eventually(format!("{bytes} bytes pass"), FOLLOW, || {
        let largest = largest_packet(from, to.ip())?;
        ensure!(largest == bytes, "{largest} bytes");
        Ok(())
    })
}

/// What ping prints, whether or not anybody answers.
fn pinged(from: &dyn Place, flags: &[&str], to: Ipv4Addr) -> Result<String> {
    let to = to.to_string();
    let said = from.run(&[&["ping", "-n", "-c", "1", "-W", "2"], flags, &[&to]].concat())?;
    Ok(format!("{}{}", said.stdout, said.stderr))
}

#[test]
fn udp_is_as_flannel_has_it() {
    in_lab(Lab::new("udp").hosts(3).etcd(), |lab| {
        put_config(lab, UDP)?;
        let daemons = Flanneld::start_all(lab)?;
        for host in lab.hosts() {
            let env = SubnetEnv::read(host)?;
            let expected = format!(
                "FLANNEL_NETWORK=10.100.0.0/16\nFLANNEL_SUBNET={}\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n",
                env.gateway()
            );
            unchanged("subnet.env", &expected, &env.text)?;
            let value = format!(r#"{{"PublicIP":"{}","PublicIPv6":null}}"#, host.ip());
            ensure!(leases(lab)?.get(&env.key()) == Some(&value), "{:?}", leases(lab)?);
            let link = host.out(&["ip", "-d", "link", "show", "flannel0"])?;
            ensure!(link.contains(" mtu 1472 ") && link.contains("tun type tun"), "{link}");
            ensure!(link.contains(",UP,LOWER_UP>") && link.contains("persist off"), "{link}");
            let address = host.sh("ip -4 -o addr show dev flannel0 | sed 's/^[0-9]*: //; s/\\\\.*//'")?;
            ensure!(
                address.trim() == format!("flannel0    inet {}/32 scope global flannel0", env.base()),
                "{address}"
            );
            let routes = host.out(&["ip", "route", "show", "dev", "flannel0"])?;
            ensure!(routes.trim() == "10.100.0.0/16", "{routes}");
        }
        let pods = pods(lab)?;
        for from in &pods {
            for to in pods.iter().filter(|to| to.ip() != from.ip()) {
                ping_within(FOLLOW, from, to.ip())?;
            }
        }
        let said = pinged(&pods[0], &["-M", "do", "-s", "1445"], pods[1].ip())?;
        ensure!(said.contains("Frag needed and DF set (mtu = 1472)"), "{said}");
        carries_exactly(&pods[0], &pods[1], 1472)?;
        for size in ["1500", "4000", "20000"] {
            let said = pinged(&pods[2], &["-M", "dont", "-s", size], pods[1].ip())?;
            ensure!(said.contains(" 0% packet loss"), "{said}");
        }
        // The host itself reaches pods elsewhere too.
        ping_within(FOLLOW, lab.host(1), pods[1].ip())?;
        let text = long_text();
        carries_text(&pods[0], &pods[1], &text)?;
        carries_text(&pods[1], &pods[2], &text)?;
        for daemon in &daemons {
            ensure!(
                daemon.said(" ERROR ").is_empty() && daemon.said("WARN").is_empty(),
                "{}",
                daemon.daemon().tail()
            );
        }
        Ok(())
    });
}

#[test]
fn one_packet_a_call_and_large_pieces_understand_each_other() {
    in_lab(Lab::new("udp-plain").etcd(), |lab| {
        put_config(lab, UDP)?;
        let plain = Flanneld::start_with(lab, lab.host(1), &["--iface", "eth0", "--udp-offload=false"])?;
        let full = Flanneld::start(lab, lab.host(2))?;
        plain.ready()?;
        full.ready()?;
        ensure!(
            plain
                .said("1 queues, the device's offload: Nothing, segments out: false, in: false, batches of 1")
                .len()
                == 1,
            "{}",
            plain.daemon().tail()
        );
        ensure!(full.said("segments out: true, in: true").len() == 1, "{}", full.daemon().tail());
        let pods = pods(lab)?;
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        let text = long_text();
        carries_text(&pods[0], &pods[1], &text)?;
        carries_text(&pods[1], &pods[0], &text)?;
        carries_exactly(&pods[0], &pods[1], 1472)?;
        carries_exactly(&pods[1], &pods[0], 1472)?;
        Ok(())
    });
}

#[test]
fn without_a_backend_the_config_means_udp() {
    in_lab(Lab::new("udp-absent").hosts(1).etcd(), |lab| {
        put_config(lab, r#"{"Network":"10.100.0.0/16"}"#)?;
        let daemon = Flanneld::start(lab, lab.host(1))?;
        let env = daemon.ready()?;
        ensure!(env.mtu == 1472, "{}", env.text);
        ensure!(daemon.said("E104").len() == 1, "{}", daemon.daemon().tail());
        ensure!(lab.host(1).exists("/sys/class/net/flannel0"));
        Ok(())
    });
}

#[test]
fn every_hop_takes_one_from_the_ttl_and_says_where_it_ended() {
    in_lab(Lab::new("udp-ttl").etcd(), |lab| {
        put_config(lab, UDP)?;
        Flanneld::start_all(lab)?;
        let envs = [SubnetEnv::read(lab.host(1))?, SubnetEnv::read(lab.host(2))?];
        let pods = pods(lab)?;
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        // The host's own forwarding, the way out, the way in, the other host's own forwarding.
        let hops = [envs[0].address(1), envs[0].base(), envs[1].base(), envs[1].base()];
        for (hop, ttl) in hops.iter().zip(["1", "2", "3", "4"]) {
            let said = pinged(&pods[0], &["-t", ttl], pods[1].ip())?;
            ensure!(
                said.contains(&format!("From {hop} icmp_seq=1 Time to live exceeded")),
                "TTL {ttl}: {said}"
            );
        }
        let said = pinged(&pods[0], &["-t", "5"], pods[1].ip())?;
        ensure!(said.contains("ttl=60"), "{said}");
        Ok(())
    });
}

#[test]
fn who_is_nobodys_is_unreachable_and_who_joins_is_reached() {
    in_lab(Lab::new("udp-join").hosts(3).etcd(), |lab| {
        put_config(lab, UDP)?;
        let first = [Flanneld::start(lab, lab.host(1))?, Flanneld::start(lab, lab.host(2))?];
        let envs = [first[0].ready()?, first[1].ready()?];
        let near = [Pod::new(lab.host(1), &envs[0], 2)?, Pod::new(lab.host(2), &envs[1], 2)?];
        ping_within(FOLLOW, &near[0], near[1].ip())?;
        let base = envs[0].base();
        let nobody = Ipv4Addr::new(10, 100, 0, 9);
        let said = pinged(&near[0], &[], nobody)?;
        ensure!(said.contains(&format!("From {base} icmp_seq=1 Destination Net Unreachable")), "{said}");

        let third = Flanneld::start(lab, lab.host(3))?;
        let far = Pod::new(lab.host(3), &third.ready()?, 2)?;
        ping_within(FOLLOW, &near[0], far.ip())?;
        ping_within(FOLLOW, &far, near[1].ip())?;

        // Gone from the store: gone from the table of the others, who do not take its packets any more either.
        let key = SubnetEnv::read(lab.host(3))?.key();
        third.daemon().crash()?;
        lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{key}")])?;
        eventually("the third one is nobody's", FOLLOW, || {
            let said = pinged(&near[0], &[], far.ip())?;
            ensure!(said.contains("Destination Net Unreachable"), "{said}");
            Ok(())
        })?;
        ping(&near[0], near[1].ip())
    });
}

#[test]
fn nothing_outlives_the_daemon_and_everything_comes_back_with_it() {
    in_lab(Lab::new("udp-restart").etcd(), |lab| {
        put_config(lab, UDP)?;
        let mut daemons = Flanneld::start_all(lab)?;
        let pods = pods(lab)?;
        let host = lab.host(1);
        let state = || {
            host.sh("ip -4 -o addr | sed 's/^[0-9]*//'; ip -4 route; ip -o link show flannel0 | sed 's/^[0-9]*//'")
        };
        let before = state()?;
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        let held = leases(lab)?;
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            daemons[0].daemon().kill(signal)?;
            daemons[0].daemon().wait(secs(10))?;
            // No device and no route that would swallow packets, whoever starts next.
            ensure!(!host.exists("/sys/class/net/flannel0"), "flannel0 is left after {signal}");
            let routes = host.out(&["ip", "route"])?;
            ensure!(!routes.contains("10.100.0.0/16"), "{routes}");
            daemons[0] = Flanneld::start(lab, host)?;
            daemons[0].ready()?;
            ping_within(FOLLOW, &pods[1], pods[0].ip())?;
            ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        }
        ensure!(leases(lab)? == held);

        // Somebody removes the device, its address, its route; sets it down.
        for harm in [
            "ip link del flannel0",
            "ip addr flush dev flannel0",
            "ip route del 10.100.0.0/16",
            "ip link set flannel0 down",
        ] {
            host.sh(harm)?;
            ping_within(FOLLOW, &pods[0], pods[1].ip()).context(harm)?;
        }
        eventually("everything is as it was", FOLLOW, || unchanged("the host", &before, &state()?))?;

        put_config(lab, VXLAN)?;
        for host in lab.hosts() {
            eventually("flannel.1 in the place of flannel0", FOLLOW, || {
                ensure!(host.exists("/sys/class/net/flannel.1"), "no flannel.1");
                ensure!(!host.exists("/sys/class/net/flannel0"), "flannel0 is still there");
                Ok(())
            })?;
        }
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        put_config(lab, UDP)?;
        eventually("flannel0 in the place of flannel.1", FOLLOW, || {
            ensure!(!host.exists("/sys/class/net/flannel.1"), "flannel.1 is still there");
            ping(&pods[0], pods[1].ip())
        })?;

        daemons[0].daemon().stop(secs(10))?;
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        host.out(&["flanneld", &endpoints, "--cleanup"])?;
        ensure!(!leases(lab)?.contains_key(&SubnetEnv::read(lab.host(2))?.key()) || leases(lab)?.len() == 1);
        Ok(())
    });
}

#[test]
fn a_device_of_somebody_elses_is_let_be() {
    in_lab(Lab::new("udp-taken").hosts(1).etcd(), |lab| {
        put_config(lab, UDP)?;
        let host = lab.host(1);
        host.sh("ip tuntap add flannel0 mode tun multi_queue vnet_hdr")?;
        let daemon = Flanneld::start(lab, host)?;
        let wanted = "there is another interface flannel0; if nobody uses it: ip link del flannel0";
        eventually("it is said", FOLLOW, || !daemon.said(wanted).is_empty())?;
        ensure!(daemon.health("/readyz")?.0 == 503);
        host.sh("ip link del flannel0")?;
        daemon.ready()?;
        ensure!(daemon.said(wanted).len() == 1, "{}", daemon.daemon().tail());
        Ok(())
    });
}

#[test]
fn only_holders_of_a_lease_are_heard_and_only_from_their_subnet() {
    in_lab(Lab::new("udp-spoof").hosts(3).etcd().needs(&["perl"]), |lab| {
        put_config(lab, UDP)?;
        let daemons = Flanneld::start_all(lab)?;
        let pods = pods(lab)?;
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        ping_within(FOLLOW, &pods[2], pods[1].ip())?;
        let (holder, target) = (lab.host(1), lab.host(2));
        let listeners = [listen(&pods[1])?, listen(target)?];
        let all = || listeners.iter().map(Daemon::log).collect::<String>();
        let send = |from: &Host, source: Ipv4Addr, to: Ipv4Addr, text: &str| {
            inject(from, target.ip(), source, to, text)
        };

        // The control: such a packet made by hand is a packet.
        eventually("a sound packet arrives", FOLLOW, || {
            send(holder, pods[0].ip(), pods[1].ip(), "genuine;")?;
            ensure!(all().contains("genuine;"), "{}", all());
            Ok(())
        })?;
        // A stranger; the holder of one lease in the name of another; a source outside the network; not for us.
        send(lab.router(), pods[0].ip(), pods[1].ip(), "stranger;")?;
        send(holder, pods[2].ip(), pods[1].ip(), "neighbor;")?;
        send(holder, Ipv4Addr::new(192, 0, 2, 1), pods[1].ip(), "outside;")?;
        send(holder, pods[1].ip(), pods[1].ip(), "yourself;")?;
        send(holder, pods[0].ip(), target.ip(), "host;")?;
        eventually("what came after them arrives", FOLLOW, || {
            send(holder, pods[0].ip(), pods[1].ip(), "last;")?;
            ensure!(all().contains("last;"), "{}", all());
            Ok(())
        })?;
        let log = all();
        for dropped in ["stranger;", "neighbor;", "outside;", "yourself;", "host;"] {
            ensure!(!log.contains(dropped), "{dropped} got through: {log}");
        }
        // Said once for each kind, however many there are.
        eventually("it is said", FOLLOW, || {
            let said = daemons[1].said("came from nobody who holds a lease");
            ensure!(said.len() == 1 && said[0].contains("10.77.0.1"), "{said:?}");
            Ok(())
        })?;
        let said = daemons[1].said("are not from their sender's subnet to ours");
        ensure!(
            !said.is_empty() && said.len() <= 2 && said[0].contains(&holder.ip().to_string()),
            "{said:?}"
        );
        Ok(())
    });
}

/// A socket that writes down what comes to port 7777.
fn listen(place: &dyn Place) -> Result<Daemon> {
    let program = "use Socket; $| = 1; socket(S, PF_INET, SOCK_DGRAM, 17) && bind(S, sockaddr_in(7777, INADDR_ANY)) or die; \
        print \"$b\\n\" while defined recv(S, $b, 2000, 0)";
    let listener = place.spawn("listener", &["perl", "-e", program], &[])?;
    eventually("the listener listens", FOLLOW, || {
        let sockets = place.out(&["ss", "-uln"])?;
        ensure!(sockets.contains(":7777"), "{sockets}");
        Ok(())
    })?;
    Ok(listener)
}

/// Sends a datagram with an inner packet of one's own making to the tunnel's port.
fn inject(from: &Host, tunnel: Ipv4Addr, source: Ipv4Addr, to: Ipv4Addr, text: &str) -> Result<()> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0];
    packet.extend(source.octets());
    packet.extend(to.octets());
    let total = (28 + text.len()) as u16;
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    let words = packet.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    // UDP from port 9 to 7777, without a checksum (RFC 768).
    packet.extend([0, 9, 0x1e, 0x61]);
    packet.extend((8 + text.len() as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(text.as_bytes());
    from.write("/run/lab/tmp/packet", &packet)?;
    let send = format!("cat /run/lab/tmp/packet > /dev/udp/{tunnel}/8285");
    from.out(&["bash", "-ec", &send]).map(|_| ())
}

#[test]
fn a_narrow_path_is_told_to_who_asks_and_cut_for_the_others() {
    in_lab(Lab::new("udp-narrow").hosts(2).behind_router(&[2]).etcd(), |lab| {
        put_config(lab, UDP)?;
        Flanneld::start_all(lab)?;
        let pods = pods(lab)?;
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        // Between the hosts there is a link of 1,400 bytes, which only the router knows.
        let narrow = "for net in 10.77.0.0/24 10.77.1.0/24; do \
             ip route replace $(ip -4 route show $net | sed 's/proto kernel//') proto kernel mtu lock 1400; done; ip -4 route";
        let routes = lab.router().sh(narrow)?;
        ensure!(routes.matches("mtu lock 1400").count() == 2, "{routes}");
        eventually("the sender is told", FOLLOW, || {
            let said = pinged(&pods[0], &["-M", "do", "-s", "1400"], pods[1].ip())?;
            ensure!(said.contains("(mtu = 1372)"), "{said}");
            Ok(())
        })?;
        carries_exactly(&pods[0], &pods[1], 1372)?;
        // The first answer teaches the other host.
        eventually("larger ones pass in pieces", FOLLOW, || {
            let said = pinged(&pods[0], &["-M", "dont", "-s", "1444"], pods[1].ip())?;
            ensure!(said.contains(" 0% packet loss"), "{said}");
            Ok(())
        })?;
        carries_text(&pods[1], &pods[0], &long_text())
    });
}
