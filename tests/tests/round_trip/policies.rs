//! Policies of IPsec in a real kernel.

use std::collections::BTreeSet;

use anyhow::ensure;
use flannel_core::touch::world::World as _;
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::fact::{Change, Fact, Facts, Policy, PolicyDirection, diff};
use flannel_core::words::territory::Territory;
use flannel_tests::needs::skipped;
use flannel_tests::{alone, sh};

use super::{aliased, all, there_and_back};

#[test]
fn policies_of_ipsec_beside_those_of_others() {
    alone(|| {
        if sh("ip xfrm policy count").is_err() {
            skipped("IPsec in its kernel (CONFIG_XFRM_USER)");
            return Ok(());
        }
        let others = [
            "src 10.100.5.0/24 dst 10.101.9.0/24 dir out tmpl src 192.0.2.1 dst 192.0.2.9 proto esp reqid 11 mode tunnel",
            "src 10.100.5.0/24 dst 10.100.8.0/24 dir out tmpl src 192.0.2.1 dst 192.0.2.9 proto esp reqid 12 mode tunnel",
            "src 10.100.5.0/24 dst 10.100.8.0/24 proto udp dir out tmpl src 192.0.2.1 dst 192.0.2.9 proto esp reqid 11 mode tunnel",
            "src 10.100.5.0/24 dst 10.100.7.0/24 dir in action block",
            "src 10.100.5.0/24 dst 10.100.7.0/24 dir out mark 7 tmpl src 192.0.2.1 dst 192.0.2.9 proto esp reqid 11 mode tunnel",
        ];
        for other in others {
            sh(&format!("ip xfrm policy add {other}"))?;
        }
        let foreign = sh("ip xfrm policy")?;
        let cidrs = BTreeSet::from(["10.100.0.0/16".parse()?]);
        let territory = Territory { cidrs, policies: true, ..aliased(&[]) };
        let policy = |direction, destination: &str, to: [u8; 4]| {
            Fact::Policy(Policy {
                direction,
                source: "10.100.5.0/24".parse().unwrap(),
                destination: destination.parse().unwrap(),
                from: [192, 0, 2, 1].into(),
                to: to.into(),
            })
        };
        let (out, peer) = (PolicyDirection::Out, [192, 0, 2, 9]);
        let mut kernel = Kernel::open()?;
        let facts = [out, PolicyDirection::In, PolicyDirection::Forward];
        there_and_back(
            &mut kernel,
            &territory,
            facts.map(|way| policy(way, "10.100.9.0/24", peer)).to_vec(),
        )?;
        ensure!(sh("ip xfrm policy")? == foreign, "somebody else's policies were touched");

        // What prints is what makes it; a peer that moves is replaced.
        let moved: Facts = [policy(out, "10.100.9.0/24", [192, 0, 2, 10])].into_iter().collect();
        sh(&policy(out, "10.100.9.0/24", peer).to_string())?;
        let seen = kernel.observe(&territory)?;
        ensure!(seen.len() == 1, "{seen}");
        all(kernel.apply(&diff(&moved, &seen)))?;
        ensure!(kernel.observe(&territory)? == moved);
        // What somebody else has for the same packets is not overwritten.
        let taken = policy(PolicyDirection::In, "10.100.7.0/24", peer);
        let refused = kernel.apply(&[Change::Create(&taken)]).remove(0);
        ensure!(refused.is_err());
        all(kernel.apply(&diff(&Facts::default(), &moved)))?;
        ensure!(sh("ip xfrm policy")? == foreign, "somebody else's policies were touched");

        // Thousands in one go.
        let many: Facts = (0..3000u32)
            .map(|n| policy(out, &format!("10.100.{}.{}/28", 16 + n / 16, n % 16 * 16), peer))
            .collect();
        all(kernel.apply(&diff(&many, &Facts::default())))?;
        let seen = kernel.observe(&territory)?;
        ensure!(seen == many, "{} of {} policies", seen.len(), many.len());
        all(kernel.apply(&diff(&Facts::default(), &seen)))?;
        ensure!(sh("ip xfrm policy")? == foreign, "somebody else's policies were touched");
        Ok(())
    });
}
