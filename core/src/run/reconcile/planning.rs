//! What a pass brings the kernel to: the plan, and what of this host it is made from.

use std::collections::BTreeSet;

use super::known::Known;
use super::{Inputs, MANY, PassError, ReaderInputs, Thread, open};
use crate::decide::firewall;
use crate::decide::plan::{self, Plan, PlanError, plan, remains};
use crate::decide::reader::{self, ReaderScene};
use crate::run::survey::Public;
use crate::touch::uplink;
use crate::words::name::LinkName;
use crate::words::node::Node;

impl Thread {
    pub(super) fn plan(
        &mut self,
        inputs: &Inputs,
        ports: &BTreeSet<LinkName>,
        known: Option<Known>,
    ) -> Result<(Plan, Node), PassError> {
        let node = self.node(inputs, ports)?;
        self.tell_of_iptables(inputs, &node);
        self.guard.tell(&inputs.config, &node);
        // What endpoints want is not among the inputs.
        let known = known.filter(|_| self.endpoints.exposure().is_none());
        if let Some(plan) = known.and_then(|known| known.again(inputs, &node)) {
            return Ok((plan, node));
        }
        let plan = self.plan_for(inputs, &node)?;
        // They stay until leases change, or longer.
        let facts = if plan.facts.len() > MANY { plan.facts.compact() } else { plan.facts };
        Ok((Plan { facts, ..plan }, node))
    }

    pub(super) fn plan_for(&self, inputs: &Inputs, node: &Node) -> Result<Plan, PlanError> {
        let mut plan = plan(&self.plan_inputs(inputs, node))?;
        plan.territory.cidrs.extend(&inputs.former);
        self.guard.let_be(&mut plan.territory);
        Ok(plan)
    }

    pub(super) fn plan_inputs<'a>(&'a self, inputs: &'a Inputs, node: &'a Node) -> plan::Inputs<'a> {
        plan::Inputs {
            network: &self.place.network,
            config: &inputs.config,
            node,
            own: &inputs.own,
            leases: &inputs.leases,
            bridge: self.place.bridge,
            masquerade: self.place.masquerade,
            fully_random: self.place.fully_random,
            forward: self.place.forward,
            guard: self.guard.is_wanted(),
            blackhole: self.place.blackhole,
            isolated_from: &inputs.isolated_from,
            exposure: self.endpoints.exposure(),
        }
    }

    fn tell_of_iptables(&mut self, inputs: &Inputs, node: &Node) {
        let chains = self.place.network.is_default() && (self.place.masquerade || self.place.forward);
        let missing = |family| !node.iptables.written.contains_key(family);
        if chains
            && !inputs.config.nftables
            && inputs.config.families().iter().any(missing)
            && !self.told_of_no_iptables
        {
            self.told_of_no_iptables = true;
            let table = firewall::table_name(&self.place.network);
            tracing::info!(
                "there is no iptables on this host that could be written: the rules are in table {table} of nftables"
            );
        }
    }

    pub(super) fn plan_reader(&self, inputs: &ReaderInputs, ports: &BTreeSet<LinkName>) -> Plan {
        let place = &self.place;
        let ReaderInputs { env, isolated_from } = inputs;
        reader::plan(&ReaderScene {
            network: &place.network,
            networks: &env.networks,
            gateways: &env.gateways(),
            mtu: env.mtu,
            bridge: place.bridge,
            ports,
            masquerade: place.masquerade && !env.ip_masq,
            isolated_from,
            exposure: self.endpoints.exposure(),
        })
    }

    fn node(&mut self, inputs: &Inputs, ports: &BTreeSet<LinkName>) -> Result<Node, PassError> {
        let place = self.place.clone();
        let kernel = open(&mut self.kernel)?;
        let wireguard = self.wireguard.is_in(kernel, &inputs.config)?;
        let uplink = uplink::read(kernel, inputs.uplink, &inputs.sought, &inputs.config.families())?;
        let public = Public::of(&inputs.sought, &uplink, &inputs.config);
        Ok(Node {
            public_v4: public.v4,
            public_v6: public.v6,
            identity: inputs.identity.clone(),
            routes: kernel.glance_at_routes(&remains(&place.network, inputs.config.cidrs()))?,
            forward_chains: kernel.netfilter()?.forward_chains()?,
            iptables: kernel.netfilter()?.iptables()?,
            nftables: kernel.netfilter()?.is_present()?,
            ipv6: kernel.has_ipv6(),
            ra_at_risk: inputs.config.v6.is_some() && kernel.loses_router_advertisements(inputs.uplink)?,
            wireguard,
            ports: ports.clone(),
            uplink,
        })
    }
}
