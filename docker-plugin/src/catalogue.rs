//! The networks that the store knows, and how a wish becomes one of them.

use std::path::PathBuf;

use serde_json::json;

use flannel_core::decide::plan::overlap;
use flannel_core::run::store::{Created, Store};
use flannel_core::run::{cache, retire};
use flannel_core::touch::subnet_env::SubnetEnv;
use flannel_core::words::addr::{Family, Prefix};
use flannel_core::words::config::NetworkConfig;
use flannel_core::words::name::NetworkName;
use flannel_core::words::units::Vni;

use crate::answer::{Refusal, blocking};
use crate::definition::{FALLBACK_CIDR, Wish, free_vni, vni_of};
use crate::half::create_command;
use crate::settings::Settings;
use crate::veth;

/// How often two hosts that define networks at the same moment may collide on a VNI.
const VNI_TRIES: usize = 4;

/// The store as a list of networks.
pub(crate) struct Catalogue {
    store: Store,
    /// Whether it is this machine's alone; then a default network needs no definition by hand.
    embedded: bool,
    /// What tells about the default network, also when that is another agent's and not in this store.
    subnet_file: PathBuf,
    /// Our name, for texts.
    driver: String,
}

impl Catalogue {
    pub(crate) fn new(store: Store, settings: &Settings) -> Self {
        let subnet_file = settings.subnet_file(&NetworkName::default_network());
        Self {
            store,
            embedded: settings.embedded_store().is_some(),
            subnet_file,
            driver: settings.driver_name.clone(),
        }
    }

    /// Whether a network can only be another agent's: a store of this machine alone has no config of it, so that whoever
    /// serves it (k3s, a flanneld) has it from elsewhere.
    pub(crate) async fn is_foreign(&self, network: &NetworkName) -> Result<bool, Refusal> {
        if !self.embedded || !network.is_default() {
            return Ok(false);
        }
        let config = self.store.network(network).config().await;
        config.map(|config| config.is_none()).map_err(|error| Refusal::of(&error))
    }

    /// Whether what is left of a network that no agent of ours runs for is another agent's.
    pub(crate) async fn is_anothers(
        &self,
        network: &NetworkName,
        settings: &Settings,
    ) -> Result<bool, Refusal> {
        let earlier = cache::read(&settings.common.state_dir, network).and_then(|last| last.own);
        if earlier.is_none() && self.is_foreign(network).await? {
            return Ok(true);
        }
        let (file, network) = (settings.subnet_file(network), network.clone());
        blocking(move || {
            retire::served_by_another(&file, &network).map_err(|error| Refusal(format!("{error:#}")))
        })
        .await
    }

    /// The network that a wish means: by its name, or by the CIDR that the store has under some name.
    pub(crate) async fn named(&self, wish: &Wish) -> Result<NetworkName, Refusal> {
        match (&wish.network, wish.cidr, wish.cidr_v6) {
            (Some(network), _, _) => Ok(network.clone()),
            (None, Some(cidr), _) => self.named_by(cidr, &self.known().await?),
            (None, None, Some(cidr)) => self.named_by_v6(cidr).await,
            (None, None, None) => Ok(NetworkName::default_network()),
        }
    }

    /// The network that has this IPv6 CIDR. None is defined by it: the call for IPv4 comes first, and has done that.
    async fn named_by_v6(&self, cidr: Prefix) -> Result<NetworkName, Refusal> {
        let configs = parsed(self.known().await?);
        let found = configs.iter().find(|(_, config)| config.v6.is_some_and(|v6| v6.cidr == cidr));
        if let Some((name, _)) = found {
            return Ok(name.clone());
        }
        if let Some((other, config)) =
            configs.iter().find(|(_, config)| config.cidrs().any(|c| c.overlaps(&cidr)))
        {
            return Err(overlaps(cidr, other, config));
        }
        Err(Refusal(format!(
            "no flannel network has the IPv6 CIDR {cidr}; a new one gets it together with its IPv4 CIDR: {}",
            create_command(&self.driver, None, Some(cidr))
        )))
    }

    /// Finds the network of a wish in the store, or defines it there. The answer is the definition, if it was made now.
    pub(crate) async fn settle(&self, wish: &Wish, network: &NetworkName) -> Result<Option<String>, Refusal> {
        let known = self.known().await?;
        if let Some((_, document)) = known.iter().find(|(name, _)| name == network) {
            agree(wish, network, document)?;
            return Ok(None);
        }
        let fallback = network.is_default() && self.embedded;
        let cidr = match wish.cidr {
            Some(cidr) => cidr,
            None if fallback => FALLBACK_CIDR.parse().map_err(|error| Refusal(format!("{error}")))?,
            None => {
                return Err(Refusal(format!(
                    "the store has no config of network {network}: put one there, or define it with --subnet CIDR (and --ipam-opt backend=…)"
                )));
            }
        };
        let mut known = parsed(known);
        for _ in 0..VNI_TRIES {
            if let Some((other, config)) =
                known.iter().find(|(_, config)| config.cidrs().any(|c| c.overlaps(&cidr)))
            {
                return Err(overlaps(cidr, other, config));
            }
            let config = self.defined(wish, cidr, &known).await?;
            if let Some(v6) = config.v6
                && let Some((other, theirs)) =
                    known.iter().find(|(_, config)| config.cidrs().any(|c| c.overlaps(&v6.cidr)))
            {
                return Err(overlaps(v6.cidr, other, theirs));
            }
            let document = config.to_json();
            match self.store.network(network).create_config(&document).await.map_err(|e| Refusal::of(&e))? {
                Created::Exists(document) => {
                    agree(wish, network, &document)?;
                    return Ok(None);
                }
                Created::Made => {}
            }
            // Another host may have defined another network with the same VNI in this very moment; of the two the one
            // whose name comes first keeps it.
            known = parsed(self.known().await?);
            let vni = vni_of(&config);
            known.retain(|(name, _)| name != network);
            let clash =
                known.iter().any(|(name, other)| vni.is_some() && vni_of(other) == vni && name < network);
            if !clash {
                tracing::info!(%network, config = document, "network defined");
                return Ok(Some(document));
            }
            self.store.network(network).remove().await.map_err(|error| Refusal::of(&error))?;
        }
        Err(Refusal(format!(
            "network {network}: other hosts are defining networks at the same time; try again"
        )))
    }

    /// The config of a new network, refused if this host could not use it.
    async fn defined(
        &self,
        wish: &Wish,
        cidr: Prefix,
        known: &[(NetworkName, NetworkConfig)],
    ) -> Result<NetworkConfig, Refusal> {
        let vni = free_vni(known.iter().map(|(_, config)| config)).unwrap_or(Vni::ONE);
        let config = wish
            .define(&cidr, vni)
            .map_err(|error| Refusal(format!("a network cannot be defined as {wish}: {error}")))?;
        let taken =
            known.iter().find(|(_, other)| vni_of(&config).is_some() && vni_of(other) == vni_of(&config));
        if let Some((other, _)) = taken {
            return Err(Refusal(format!(
                "VNI {} is network {other}'s: give another one, or none and a free one is taken",
                vni_of(&config).map(Vni::id).unwrap_or_default()
            )));
        }
        let routes = blocking(veth::host_routes).await?;
        match overlap(&config, &routes) {
            Some(finding) => Err(Refusal(format!("{finding}"))),
            None => Ok(config),
        }
    }

    async fn known(&self) -> Result<Vec<(NetworkName, String)>, Refusal> {
        let known = self.store.networks().await;
        let mut known = known.map_err(|error| Refusal(error.finding().to_string()))?;
        let default = NetworkName::default_network();
        if self.embedded && !known.iter().any(|(name, _)| *name == default) {
            known.extend(self.foreign().map(|document| (default, document)));
        }
        Ok(known)
    }

    /// What is known of a default network that another agent of this host serves, as a config document. Its backend is not,
    /// and no concern of ours.
    fn foreign(&self) -> Option<String> {
        let env = SubnetEnv::read(&self.subnet_file).ok()?;
        let (cidr, own) = (env.network(Family::V4)?, env.subnet(Family::V4)?);
        let mut document =
            json!({"Network": cidr.to_string(), "SubnetLen": own.len(), "Backend": {"Type": "alloc"}});
        if let (Some(cidr), Some(own)) = (env.network(Family::V6), env.subnet(Family::V6)) {
            document["EnableIPv6"] = json!(true);
            document["IPv6Network"] = json!(cidr.to_string());
            document["IPv6SubnetLen"] = json!(own.len());
        }
        Some(document.to_string())
    }

    /// The network that has this CIDR, or the name that a new one gets.
    fn named_by(&self, cidr: Prefix, known: &[(NetworkName, String)]) -> Result<NetworkName, Refusal> {
        let configs = parsed(known.to_vec());
        if let Some((name, _)) =
            configs.iter().find(|(_, config)| config.v4.is_some_and(|v4| v4.cidr == cidr))
        {
            return Ok(name.clone());
        }
        if let Some((other, config)) =
            configs.iter().find(|(_, config)| config.cidrs().any(|c| c.overlaps(&cidr)))
        {
            return Err(overlaps(cidr, other, config));
        }
        let default = NetworkName::default_network();
        match known.iter().any(|(name, _)| *name == default) {
            false => Ok(default),
            true => Wish::name_for(&cidr).map_err(|error| Refusal::of(&error)),
        }
    }

    /// Removes a definition that was made for a `docker network create`, if it is still that and nobody leases.
    pub(crate) async fn undefine(&self, network: &NetworkName, defined: Option<&str>) -> Result<(), Refusal> {
        let Some(defined) = defined else { return Ok(()) };
        let store = self.store.network(network);
        if store.config().await.map_err(|error| Refusal::of(&error))?.as_deref() == Some(defined)
            && let Err(error) = store.remove().await
        {
            tracing::info!(%network, "its definition stays in the store: {error}");
        }
        Ok(())
    }
}

/// Configs that can be read; one that cannot is nobody's CIDR.
fn parsed(known: Vec<(NetworkName, String)>) -> Vec<(NetworkName, NetworkConfig)> {
    let parse =
        |(name, document): (NetworkName, String)| Some((name, NetworkConfig::parse(&document).ok()?.config));
    known.into_iter().filter_map(parse).collect()
}

fn agree(wish: &Wish, network: &NetworkName, document: &str) -> Result<(), Refusal> {
    let stored = NetworkConfig::parse(document)
        .map_err(|error| {
            Refusal(format!("the config of network {network} in the store cannot be used: {error}"))
        })?
        .config;
    match wish.agrees_with(&stored) {
        true => Ok(()),
        false => Err(Refusal(format!(
            "network {network} is already defined otherwise: the store has {}, asked for was {wish}; leave the options out to join it, or take another network",
            stored.shown()
        ))),
    }
}

fn overlaps(cidr: Prefix, other: &NetworkName, config: &NetworkConfig) -> Refusal {
    let theirs: Vec<String> = config.cidrs().map(|cidr| cidr.to_string()).collect();
    Refusal(format!(
        "the network {cidr} overlaps flannel network {other}, which is {}: use --subnet {} to join it (the answer is this host's part), or a CIDR outside of it",
        theirs.join(" "),
        theirs.join(" --subnet ")
    ))
}
