//! Our routes among the host's.

use std::collections::BTreeSet;

use super::{Kernel, Ours, io_error, link, route, settled};
use crate::touch::world::WorldError;
use crate::words::addr::Family;
use crate::words::fact::{Blackhole, Fact, RouteProtocol, Tally};
use crate::words::territory::Territory;

impl Kernel {
    /// Names of the interfaces that routes with our mark leave by, when they are not ours.
    pub(super) fn name_outsiders(&mut self, t: &Territory, ours: &mut Ours) -> Result<(), WorldError> {
        if t.alias.is_some() || t.cidrs.is_empty() {
            return Ok(());
        }
        let marked = Some(RouteProtocol::FLANNEL.0);
        let filter = route::Filter { protocol: marked, unicast: true, ..route::Filter::default() };
        let mut missing = BTreeSet::new();
        for family in [Family::V4, Family::V6] {
            let found = route::dump(&mut self.socket, family, filter, |seen| {
                missing.extend(seen.index.filter(|index| !ours.names.contains_key(index)));
                None::<()>
            });
            settled("look at the routes", found)?;
        }
        let missing: Vec<_> = missing.into_iter().collect();
        let found =
            link::by_index(&mut self.socket, &missing).map_err(|e| io_error("look at the interfaces", e))?;
        ours.names.extend(found.into_iter().flatten().map(|seen| (seen.index, seen.name)));
        Ok(())
    }

    pub(super) fn observe_routes(
        &mut self,
        t: &Territory,
        ours: &Ours,
        tally: &mut Tally<'_>,
    ) -> Result<(), WorldError> {
        let held = |seen: &route::Seen| {
            let route = seen.fact(|index| ours.names.get(&index).copied())?;
            t.holds_route(&ours.links, &route).then_some(route)
        };
        let mut filters = Vec::new();
        let glanced = self.glanced.take();
        match &glanced {
            Some(glanced) => {
                glanced.iter().filter_map(held).for_each(|route| tally.see(Fact::Route(route)));
            }
            None => {
                let of = |index| route::Filter { index, unicast: true, ..route::Filter::default() };
                filters.extend(ours.asked().map(of));
                if !t.cidrs.is_empty() && filters.iter().all(|filter| filter.index.is_some()) {
                    let marked = Some(RouteProtocol::FLANNEL.0);
                    filters.push(route::Filter {
                        protocol: marked,
                        unicast: true,
                        ..route::Filter::default()
                    });
                }
            }
        }
        for table in &t.route_tables {
            let unicast = true;
            filters.push(route::Filter { unicast, table: *table, ..route::Filter::default() });
        }
        for family in [Family::V4, Family::V6] {
            for filter in &filters {
                let found = route::dump(&mut self.socket, family, *filter, |seen| held(&seen));
                settled("look at the routes", found)?
                    .into_iter()
                    .for_each(|route| tally.see(Fact::Route(route)));
            }
        }
        self.observe_blackholes(t, glanced.as_deref(), tally)
    }

    /// Only for whoever looks at a whole network: an endpoint has none.
    fn observe_blackholes(
        &mut self,
        t: &Territory,
        glanced: Option<&[route::Seen]>,
        tally: &mut Tally<'_>,
    ) -> Result<(), WorldError> {
        if t.cidrs.is_empty() || t.alias.is_none() {
            return Ok(());
        }
        let held = |seen: &route::Seen| {
            let ours = seen.blackhole && t.holds_blackhole(&seen.destination, RouteProtocol(seen.protocol));
            ours.then_some(seen.destination)
        };
        if let Some(glanced) = glanced {
            for destination in glanced.iter().filter_map(held) {
                tally.see(Fact::Blackhole(Blackhole { destination }));
            }
            return Ok(());
        }
        let filter = route::Filter { blackhole: true, ..route::Filter::default() };
        for family in [Family::V4, Family::V6] {
            let found = route::dump(&mut self.socket, family, filter, |seen| held(&seen));
            for destination in settled("look at the routes", found)? {
                tally.see(Fact::Blackhole(Blackhole { destination }));
            }
        }
        Ok(())
    }
}
