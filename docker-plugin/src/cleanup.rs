//! Taking away everything that the plugin made on this host, while it does not run.

use std::collections::BTreeSet;
use std::fs;

use anyhow::Context;

use flannel_core::run::retire;
use flannel_core::run::store::Store;
use flannel_core::words::name::NetworkName;

use crate::addresses::Addresses;
use crate::answer::Refusal;
use crate::catalogue::Catalogue;
use crate::journal::Journal;
use crate::settings::Settings;
use crate::veth;

/// Veth pairs, addresses, networks with their leases, the journal. Docker's own records of its networks stay: they are
/// removed with `docker network rm`.
pub(crate) async fn everything(settings: &Settings, store: &Store, journal: &Journal) -> anyhow::Result<()> {
    let mut networks: BTreeSet<NetworkName> = BTreeSet::from([NetworkName::default_network()]);
    networks.extend(journal.networks().all().into_iter().map(|(_, record)| record.network));
    networks.extend(journal.pools().all().into_iter().map(|(_, record)| record.network));
    let catalogue = Catalogue::new(store.clone(), settings);
    for (id, endpoint) in journal.endpoints().all() {
        veth::detach(&id, &endpoint.network)?;
        networks.insert(endpoint.network);
    }
    for network in networks {
        let file = settings.subnet_file(&network);
        Addresses::give_back_all(&file, &settings.ledger_dir, &network)?;
        let anothers = catalogue.is_anothers(&network, settings).await;
        let left = match anothers.map_err(|Refusal(text)| anyhow::anyhow!(text))? {
            true => retire::reader(&file, &network),
            false => retire::everything(&settings.common, store.network(&network)).await,
        };
        left.with_context(|| format!("network {network}"))?;
        let defined = journal.pools().get(network.as_str()).and_then(|record| record.defined);
        let undefined = catalogue.undefine(&network, defined.as_deref()).await;
        if let Err(Refusal(text)) = undefined {
            tracing::warn!(%network, "its definition stays in the store: {text}");
        }
    }
    let dir = settings.common.state_dir.join("docker");
    fs::remove_dir_all(&dir).with_context(|| format!("could not remove {}", dir.display()))?;
    // Ours if it is empty.
    let _ = fs::remove_dir(&settings.common.state_dir);
    Ok(())
}
