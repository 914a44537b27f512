//! flanneld's extension backend on real hosts: commands of the operator's carry the packets, and are told who comes and goes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, Pod, SubnetEnv, leases, put_config};
use flannel_tests::{Host, Lab, Signal, eventually, in_lab, ping_within, secs, unchanged};
use serde_json::json;

/// How long until a change is everywhere; a command may hang for a while before.
const FOLLOW: Duration = Duration::from_secs(20);
const FLAGS: &[&str] = &["--iface", "eth0", "--ip-masq"];
const ALLOWED: &[&str] = &["--iface", "eth0", "--ip-masq", "--allow-extension"];

/// host-gw by script: each command leaves a line where the test reads it.
fn routes(mut more: serde_json::Value) -> String {
    let told = "echo \"$SUBNET $PUBLIC_IP $IPV6SUBNET $PUBLIC_IPV6 <$(cat)>\"";
    let mut backend = json!({
        "Type": "extension",
        "SubnetAddCommand": format!("{told} >> /run/added; ip route add $SUBNET via $PUBLIC_IP"),
        "SubnetRemoveCommand": format!("{told} >> /run/removed; ip route del $SUBNET"),
    });
    if let (Some(backend), Some(more)) = (backend.as_object_mut(), more.as_object_mut()) {
        backend.append(more);
    }
    json!({"Network": "10.100.0.0/16", "Backend": backend}).to_string()
}

fn start(lab: &Lab, number: usize) -> Result<(Flanneld, SubnetEnv)> {
    let daemon = Flanneld::start_with(lab, lab.host(number), ALLOWED)?;
    let env = daemon.ready()?;
    Ok((daemon, env))
}

fn lines(host: &Host, file: &str) -> Result<Vec<String>> {
    Ok(host.sh(&format!("cat {file} 2>/dev/null || true"))?.lines().map(str::to_owned).collect())
}

fn told(host: &Host, file: &str, expected: &[String]) -> Result<()> {
    eventually(format!("{file} on {}", host.name()), FOLLOW, || {
        let mut lines = lines(host, file)?;
        lines.sort();
        ensure!(lines == expected, "{lines:#?}");
        Ok(())
    })
}

fn line(env: &SubnetEnv, host: &Host, data: &str) -> String {
    format!("{} {} ::/0 <nil> <{data}>", env.subnet(), host.ip())
}

/// Commands may make any routes, so their network may be one in which the hosts are, too.
#[test]
fn hosts_may_have_addresses_of_the_network() {
    in_lab(Lab::new("ext-inside").hosts(1).etcd(), |lab| {
        put_config(lab, &routes(json!({})).replace("10.100.0.0/16", "10.64.0.0/10"))?;
        let (one, env) = start(lab, 1)?;
        let host = lab.host(1);
        Pod::new(host, &env, 2)?;
        // A reason to look at the uplink again.
        let ip = host.ip();
        host.sh(&format!("ip addr del {ip}/24 dev eth0; sleep 0.2; ip addr add {ip}/24 dev eth0"))?;
        host.sh("ip route replace default via 10.77.0.1")?;
        eventually("it serves with the same address", FOLLOW, || {
            ensure!(one.health("/readyz")?.0 == 200, "{}", one.daemon().tail());
            Ok(())
        })?;
        let value = leases(lab)?.remove(&env.key()).context("no lease")?;
        ensure!(value.contains(&format!(r#""PublicIP":"{ip}""#)), "{value}");
        Ok(())
    });
}

#[test]
fn a_script_makes_routes_and_is_told_who_comes_and_goes() {
    in_lab(Lab::new("ext-routes").hosts(3).etcd(), |lab| {
        let printed = json!({"PreStartupCommand": "echo from `hostname`; echo noise >&2"});
        put_config(lab, &routes(printed))?;
        let (one, env1) = start(lab, 1)?;
        let (_two, env2) = start(lab, 2)?;
        ensure!(env1.mtu == 1500, "{}", env1.text);
        let name = |host: &Host| host.out(&["hostname"]).map(|name| format!("from {}", name.trim()));
        let value = format!(
            r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"extension","BackendData":"{}"}}"#,
            lab.host(1).ip(),
            name(lab.host(1))?
        );
        ensure!(leases(lab)?.get(&env1.key()) == Some(&value), "{:?}", leases(lab)?);
        ensure!(!one.said("it said: noise").is_empty(), "{}", one.daemon().tail());

        let pods = [Pod::new(lab.host(1), &env1, 2)?, Pod::new(lab.host(2), &env2, 2)?];
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        ping_within(FOLLOW, &pods[1], pods[0].ip())?;
        let second = line(&env2, lab.host(2), &name(lab.host(2))?);
        told(lab.host(1), "/run/added", std::slice::from_ref(&second))?;

        let (three, env3) = start(lab, 3)?;
        let far = Pod::new(lab.host(3), &env3, 2)?;
        ping_within(FOLLOW, &far, pods[1].ip())?;
        ping_within(FOLLOW, &pods[0], far.ip())?;
        three.daemon().crash()?;
        lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{}", env3.key())])?;
        let third = line(&env3, lab.host(3), &name(lab.host(3))?);
        told(lab.host(1), "/run/removed", &[third])?;
        eventually("its route is gone", FOLLOW, || {
            let routes = lab.host(1).out(&["ip", "route"])?;
            ensure!(!routes.contains(&env3.subnet()) && routes.contains(&env2.subnet()), "{routes}");
            Ok(())
        })?;
        let (_, metrics) = one.health("/metrics")?;
        let counted = r#"flannel_extension_commands_total{network="default",command="SubnetRemoveCommand",result="worked"} 1"#;
        ensure!(metrics.contains(counted), "{metrics}");
        Ok(())
    });
}

#[test]
fn a_restart_tells_the_difference_only_and_cleanup_takes_all_away() {
    in_lab(Lab::new("ext-restart").hosts(3).etcd(), |lab| {
        put_config(lab, &routes(json!({"ShutdownCommand": "echo $SUBNET > /run/shut"})))?;
        let (one, env1) = start(lab, 1)?;
        let (_two, env2) = start(lab, 2)?;
        let (three, env3) = start(lab, 3)?;
        let pods = [Pod::new(lab.host(1), &env1, 2)?, Pod::new(lab.host(2), &env2, 2)?];
        let mut both = vec![line(&env2, lab.host(2), ""), line(&env3, lab.host(3), "")];
        both.sort();
        told(lab.host(1), "/run/added", &both)?;
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        let routes = || lab.host(1).sh("ip route | grep via | sort");
        let before = routes()?;

        let mut one = one;
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            one.daemon().kill(signal)?;
            one.daemon().wait(secs(20))?;
            unchanged("routes", &before, &routes()?)?;
            one = start(lab, 1)?.0;
            told(lab.host(1), "/run/added", &both)?;
            told(lab.host(1), "/run/removed", &[])?;
        }

        // One goes while nobody looks.
        one.daemon().kill(Signal::SIGTERM)?;
        one.daemon().wait(secs(20))?;
        three.daemon().crash()?;
        lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{}", env3.key())])?;
        one = start(lab, 1)?.0;
        told(lab.host(1), "/run/removed", &[line(&env3, lab.host(3), "")])?;
        told(lab.host(1), "/run/added", &both)?;
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;

        // Stopping was no reason to shut anything down.
        ensure!(!lab.host(1).exists("/run/shut"), "ShutdownCommand ran");
        one.daemon().kill(Signal::SIGTERM)?;
        one.daemon().wait(secs(20))?;
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        lab.host(1).out(&["flanneld", &endpoints, "--cleanup", "--allow-extension"])?;
        let removed = lines(lab.host(1), "/run/removed")?;
        ensure!(removed.contains(&line(&env2, lab.host(2), "")), "{removed:?}");
        ensure!(lab.host(1).read("/run/shut")?.trim() == env1.subnet());
        let left = lab.host(1).out(&["ip", "route"])?;
        ensure!(!left.contains(&env2.subnet()), "{left}");
        Ok(())
    });
}

/// Upstream's example, in words of our own: the device is made anew at every start.
fn vxlan_by_script() -> String {
    json!({"Network": "10.100.0.0/16", "Backend": {
        "Type": "extension",
        "PreStartupCommand": "export D=vx-script; ip link del $D 2>/dev/null; ip link add $D type vxlan id 7 dstport 8472 nolearning && ip link set mtu 1450 dev $D && cat /sys/class/net/$D/address",
        "PostStartupCommand": "export D=vx-script; ip addr add `echo $SUBNET | cut -d/ -f1`/32 dev $D && ip link set up dev $D",
        "ShutdownCommand": ["ip", "link", "del", "vx-script"],
        "SubnetAddCommand": "export D=vx-script; read M; B=`echo $SUBNET | cut -d/ -f1`; ip neigh replace $B lladdr $M dev $D nud permanent && bridge fdb replace $M dev $D dst $PUBLIC_IP self permanent && ip route replace $SUBNET nexthop via $B dev $D onlink",
        "SubnetRemoveCommand": "export D=vx-script; read M; B=`echo $SUBNET | cut -d/ -f1`; ip route del $SUBNET dev $D; ip neigh del $B dev $D; bridge fdb del $M dev $D dst $PUBLIC_IP self",
    }})
    .to_string()
}

#[test]
fn a_device_made_by_script_works_again_after_a_restart_and_goes_with_the_backend() {
    in_lab(Lab::new("ext-vxlan").etcd(), |lab| {
        put_config(lab, &vxlan_by_script())?;
        let daemons = [
            Flanneld::start_with(lab, lab.host(1), ALLOWED)?,
            Flanneld::start_with(lab, lab.host(2), ALLOWED)?,
        ];
        let envs = [daemons[0].ready()?, daemons[1].ready()?];
        let pods = [Pod::new(lab.host(1), &envs[0], 2)?, Pod::new(lab.host(2), &envs[1], 2)?];
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        ping_within(FOLLOW, &pods[1], pods[0].ip())?;

        // The device, its MAC and all that was on it are new.
        let [one, two] = daemons;
        one.daemon().kill(Signal::SIGTERM)?;
        one.daemon().wait(secs(20))?;
        let (one, again) = start(lab, 1)?;
        ensure!(again.key() == envs[0].key(), "{}", again.text);
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        ping_within(FOLLOW, &pods[1], pods[0].ip())?;

        put_config(lab, r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#)?;
        for host in lab.hosts() {
            eventually("the script's device is gone", FOLLOW, || {
                ensure!(!host.exists("/sys/class/net/vx-script"), "vx-script is still there");
                Ok(())
            })?;
        }
        ping_within(FOLLOW, &pods[0], pods[1].ip())
            .with_context(|| format!("{}\n{}", one.daemon().tail(), two.daemon().tail()))
    });
}

#[test]
fn a_command_that_hangs_or_fails_holds_up_nobody_and_works_in_the_end() {
    in_lab(Lab::new("ext-faults").hosts(3).etcd(), |lab| {
        let add = "[ -e /run/fine ] || [ $PUBLIC_IP != $(cat /run/bad) ] || { echo no way >&2; $(cat /run/how); }; \
                   ip route replace $SUBNET via $PUBLIC_IP";
        put_config(lab, &routes(json!({"SubnetAddCommand": add, "CommandTimeout": 2})))?;
        let (bad, good) = (lab.host(2), lab.host(3));
        lab.host(1).write("/run/bad", bad.ip().to_string())?;
        lab.host(1).write("/run/how", "sleep 4000")?;
        for other in [2, 3] {
            // Nobody is bad for them.
            lab.host(other).write("/run/fine", "")?;
        }
        let (_two, env2) = start(lab, 2)?;
        let (_three, env3) = start(lab, 3)?;
        let (one, _) = start(lab, 1)?;
        let routes = || lab.host(1).out(&["ip", "route"]);
        let reached = |env: &SubnetEnv, host: &Host| {
            eventually("the route is there", FOLLOW, || {
                let routes = routes()?;
                ensure!(routes.contains(&format!("{} via {}", env.subnet(), host.ip())), "{routes}");
                Ok(())
            })
        };
        reached(&env3, good)?;
        ensure!(!routes()?.contains(&env2.subnet()), "{}", routes()?);
        one.daemon()
            .wait_log("had not ended after 2 s (CommandTimeout) and was killed; it said: no way", FOLLOW)?;
        ensure!(one.daemon().alive());
        let left = lab.host(1).sh("pgrep -f '^sleep 4000' | wc -l")?;
        ensure!(left.trim().parse::<u32>()? <= 1, "{left} commands are left behind");

        // It fails at once, and over and over: one line.
        lab.host(1).write("/run/how", "exit 7")?;
        one.daemon().wait_log("it ended with exit status: 7; it said: no way", FOLLOW)?;
        std::thread::sleep(secs(3));
        ensure!(one.said("exit status: 7").len() == 1, "{}", one.daemon().tail());
        let (_, metrics) = one.health("/metrics")?;
        ensure!(metrics.contains(r#"flannel_extension_commands_failing{network="default"} 1"#), "{metrics}");

        lab.host(1).write("/run/fine", "")?;
        eventually("it works in the end", secs(60), || {
            ensure!(one.said("works again").len() == 1, "{}", one.daemon().tail());
            Ok(())
        })?;
        reached(&env2, bad)?;

        // One that hangs for an hour is over when the config has another.
        put_config(
            lab,
            &crate::routes(
                json!({"PreStartupCommand": "touch /run/hangs; sleep 4001", "CommandTimeout": 3600}),
            ),
        )?;
        eventually("it hangs", FOLLOW, || lab.host(1).exists("/run/hangs"))?;
        put_config(lab, &crate::routes(json!({"PreStartupCommand": "touch /run/mended"})))?;
        eventually("the other one runs", FOLLOW, || lab.host(1).exists("/run/mended"))?;
        one.daemon().wait_log("PreStartupCommand was killed: the network config has others now", FOLLOW)?;
        eventually("nothing of it is left", FOLLOW, || {
            let left = lab.host(1).sh("pgrep -f '^sleep 4001' | wc -l")?;
            ensure!(left.trim() == "0", "{left} commands are left behind");
            Ok(())
        })
    });
}

#[test]
fn what_the_store_says_is_not_run_unless_allowed() {
    in_lab(Lab::new("ext-refused").hosts(1).etcd(), |lab| {
        let host = lab.host(1);
        put_config(lab, &routes(json!({"PreStartupCommand": "touch /run/ran"})))?;
        let daemon = Flanneld::start_with(lab, host, FLAGS)?;
        daemon.daemon().wait_log("E126", FOLLOW)?;
        ensure!(
            daemon.said("start flanneld with --allow-extension").len() == 1,
            "{}",
            daemon.daemon().tail()
        );
        ensure!(leases(lab)?.is_empty() && !host.exists("/run/ran"));

        // Nor when the config becomes one: what it was stays.
        put_config(lab, r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#)?;
        let env = daemon.ready()?;
        put_config(lab, &routes(json!({"PreStartupCommand": "touch /run/ran"})))?;
        eventually("refused again", FOLLOW, || {
            ensure!(daemon.said("E126").len() == 2, "{}", daemon.daemon().tail());
            Ok(())
        })?;
        ensure!(
            leases(lab)?.get(&env.key()).is_some_and(|value| value.contains("host-gw"))
                && !host.exists("/run/ran")
        );
        daemon.daemon().kill(Signal::SIGTERM)?;
        daemon.daemon().wait(secs(20))?;

        let argv = ["flanneld", &format!("--etcd-endpoints={}", lab.etcd_endpoint()), "--iface", "eth0"];
        let allowed = host.spawn("flanneld", &argv, &[("FLANNELD_ALLOW_EXTENSION", "true")])?;
        eventually("the command has run", FOLLOW, || {
            ensure!(host.exists("/run/ran"), "{}", allowed.tail());
            Ok(())
        })
    });
}
