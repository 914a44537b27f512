//! Token buckets and funnels in a kernel, as `tc` and we see them.

use anyhow::{Context as _, Result, ensure};
use flannel_core::touch::world::WorldError;
use flannel_core::touch::world::kernel::{Kernel, SeenBucket};
use flannel_core::words::name::{Attachment, LinkName};
use flannel_core::words::shaping::{Bucket, Funnel, Shaping};
use flannel_tests::{alone, sh};

const IN: Bucket = Bucket { rate: 2_500_000, burst: 250_000, limit: 312_500 };
const OUT: Bucket = Bucket { rate: 1_250_000, burst: 125_000, limit: 156_250 };

fn funnel(interface: &str) -> Result<Funnel> {
    let owner = Attachment { container: "c1".to_owned(), interface: interface.to_owned() };
    Ok(Funnel::of("cbr0", &owner)?)
}

fn both() -> Shaping {
    Shaping { ingress: Some(IN), egress: Some(OUT) }
}

#[test]
fn what_is_hung_up_is_seen_and_taken_down() {
    alone(|| {
        sh("ip link add veth0 mtu 1450 type veth peer name veth1; ip link set veth0 up")?;
        let end = LinkName::new("veth0")?;
        let mut kernel = Kernel::open()?;
        ensure!(kernel.shaping(end)? == Default::default());
        let funnel = funnel("eth0")?;
        let made = kernel.shape(end, &funnel, &both())?.context("no funnel")?;
        ensure!(made.name == funnel.shared_name && made.mac.is_some(), "{made:?}");

        // The count of references depends on the number of queues, and they on that of processors.
        let qdiscs = sh("tc qdisc show | sed 's/refcnt [0-9]* //'")?;
        for part in [
            "qdisc tbf 1: dev veth0 root rate 20Mbit burst 250000b lat 25ms",
            "qdisc ingress ffff: dev veth0 parent ffff:fff1",
            &format!("qdisc tbf 1: dev {} root rate 10Mbit burst 125000b lat 25ms", made.name),
        ] {
            ensure!(qdiscs.contains(part), "{part}\n{qdiscs}");
        }
        let link = sh(&format!("ip -d link show {}", made.name))?;
        for part in ["mtu 1450", "UP", "alias flannel-cni cbr0 c1/eth0", "ifb"] {
            ensure!(link.contains(part), "{part}\n{link}");
        }
        let seen = kernel.shaping(end)?;
        let bucket = |bucket: Bucket| SeenBucket { rate: bucket.rate, limit: bucket.limit };
        ensure!(seen.ingress == Some(bucket(IN)), "{seen:?}");
        ensure!(seen.egress == Some((made.name, Some(bucket(OUT)))), "{seen:?}");
        ensure!(kernel.funnels(&Funnel::mark("cbr0"))? == [(made.name, funnel.alias.clone())]);
        ensure!(kernel.funnels(&Funnel::mark("cbr"))?.is_empty());

        kernel.unshape(end, &funnel)?;
        ensure!(kernel.shaping(end)? == Default::default());
        ensure!(!sh("ip link")?.contains(Funnel::PREFIX), "{}", sh("ip link")?);
        ensure!(!kernel.remove_funnels(&funnel)?);
        Ok(())
    });
}

#[test]
fn two_interfaces_of_a_container_have_two_funnels() {
    alone(|| {
        sh("ip link add veth0 type veth peer name veth1; ip link add veth2 type veth peer name veth3")?;
        let mut kernel = Kernel::open()?;
        let (first, second) = (funnel("eth0")?, funnel("eth1")?);
        kernel.shape(LinkName::new("veth0")?, &first, &both())?;
        let made = kernel.shape(LinkName::new("veth2")?, &second, &both())?.context("no funnel")?;
        ensure!(made.name == second.own_name, "{made:?}");
        // The same once more: after a crash, an attachment may be made again.
        sh("ip link del veth2; ip link add veth2 type veth peer name veth3")?;
        kernel.shape(LinkName::new("veth2")?, &second, &both())?;
        ensure!(kernel.remove_funnels(&second)?);
        ensure!(kernel.shaping(LinkName::new("veth0")?)?.egress.is_some(), "the first lost its funnel");
        ensure!(kernel.remove_funnels(&first)?);
        ensure!(!sh("ip link")?.contains(Funnel::PREFIX));
        Ok(())
    });
}

#[test]
fn fast_links_and_failures() {
    alone(|| {
        sh("ip link add veth0 type veth peer name veth1")?;
        let end = LinkName::new("veth0")?;
        let mut kernel = Kernel::open()?;
        // More than 32 bits of bytes per second.
        let fast = Bucket { rate: 12_500_000_000, burst: 1_250_000_000, limit: 1_562_500_000 };
        kernel.shape(end, &funnel("eth0")?, &Shaping { ingress: Some(fast), egress: None })?;
        ensure!(sh("tc qdisc show dev veth0")?.contains("rate 100Gbit"));
        ensure!(kernel.shaping(end)?.ingress.is_some_and(|seen| seen.is(&fast)));
        // A clsact of somebody else stands where our entrance goes.
        sh("tc qdisc add dev veth0 clsact")?;
        let error = kernel.shape(end, &funnel("eth0")?, &both()).unwrap_err();
        ensure!(error.to_string().contains("could not shape veth0"), "{error}");
        ensure!(!sh("ip link")?.contains(Funnel::PREFIX), "a failure left its funnel");
        let nowhere = kernel.shape(LinkName::new("veth9")?, &funnel("eth0")?, &both());
        ensure!(matches!(nowhere, Err(WorldError::NoLink { .. })), "{nowhere:?}");
        Ok(())
    });
}
