//! From the rates that somebody asked for to the numbers of a token bucket.

use crate::words::shaping::Bucket;

/// How far a packet may wait in the bucket's queue: upstream's latency (plugins: plugins/meta/bandwidth/ifb_creator.go).
const LATENCY_MS: u64 = 25;
/// A burst lasts at most so long at the rate, unless that is less than a few packets.
const BURST_MS: u64 = 100;
/// A burst may always be that many packets.
const BURST_PACKETS: u64 = 10;
/// A bucket that holds less than these can starve.
const BURST_PACKETS_MIN: u64 = 2;
/// What the kernel counts on top of the MTU: an Ethernet header with a VLAN tag.
const FRAME: u64 = 18;

/// Rate and burst as runtimes and people give them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Asked {
    /// Bits per second; 0 for no limit.
    pub rate: u64,
    /// Bits.
    pub burst: u64,
}

/// What to make of the burst that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Burst {
    /// At most a tenth of a second at the rate, or ten packets if that is more. containerd and CRI-O ask for 512 MiB
    /// whatever the rate is, behind which no limit would ever be felt.
    #[default]
    Sane,
    /// As upstream does.
    AsAsked,
}

/// What cannot be done. The texts are upstream's, which people search for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ShapingError {
    /// A rate alone.
    #[error("if rate is set, burst must also be set")]
    NoBurst,
    /// A burst alone.
    #[error("if burst is set, rate must also be set")]
    NoRate,
    /// More than the kernel can count.
    #[error("burst cannot be more than 4GB")]
    BurstTooLarge,
    /// Less than the kernel can count.
    #[error("a rate of {0} bits per second is less than a byte")]
    RateTooSmall(u64),
}

/// The bucket for what was asked, on an interface with this MTU (bytes); none if nothing was.
///
/// # Errors
/// If rate and burst do not belong together.
pub fn bucket(asked: Asked, mtu: u32, burst: Burst) -> Result<Option<Bucket>, ShapingError> {
    let Asked { rate: rate_bits, burst: burst_bits } = asked;
    match (rate_bits, burst_bits) {
        (0, 0) => return Ok(None),
        (0, _) => return Err(ShapingError::NoRate),
        (_, 0) => return Err(ShapingError::NoBurst),
        (1..=7, _) => return Err(ShapingError::RateTooSmall(rate_bits)),
        _ => {}
    }
    let (rate, asked) = (rate_bits / 8, burst_bits / 8);
    if asked >= u64::from(u32::MAX) {
        return Err(ShapingError::BurstTooLarge);
    }
    let packet = u64::from(mtu) + FRAME;
    let bytes = match burst {
        Burst::AsAsked => asked,
        Burst::Sane => {
            let most = during(rate, BURST_MS).max(BURST_PACKETS * packet);
            asked.min(most).max(BURST_PACKETS_MIN * packet)
        }
    };
    let limit = during(rate, LATENCY_MS).saturating_add(bytes);
    Ok(Some(Bucket { rate, burst: saturate(bytes), limit: saturate(limit) }))
}

/// Bytes that come at the rate in so many milliseconds.
fn during(rate: u64, milliseconds: u64) -> u64 {
    saturate_long(u128::from(rate) * u128::from(milliseconds) / 1000)
}

fn saturate_long(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

fn saturate(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MTU: u32 = 1450;

    fn made(rate: u64, burst: u64, how: Burst) -> Bucket {
        bucket(Asked { rate, burst }, MTU, how).unwrap().unwrap()
    }

    #[test]
    fn containerds_burst_becomes_a_tenth_of_a_second() {
        let sane = made(20_000_000, 4_294_967_295, Burst::Sane);
        assert_eq!(sane, Bucket { rate: 2_500_000, burst: 250_000, limit: 312_500 });
        // ...or ten packets, where that is more.
        let slow = made(100_000, 4_294_967_295, Burst::Sane);
        assert_eq!(slow, Bucket { rate: 12_500, burst: 14_680, limit: 14_992 });
    }

    #[test]
    fn a_small_burst_is_kept_unless_no_packet_fits() {
        assert_eq!(made(20_000_000, 800_000, Burst::Sane).burst, 100_000);
        assert_eq!(made(20_000_000, 8, Burst::Sane).burst, 2936);
        assert_eq!(made(20_000_000, 8, Burst::AsAsked).burst, 1);
    }

    #[test]
    fn as_asked_is_upstreams_and_saturates() {
        let asked = made(10_000_000, 4_294_967_295, Burst::AsAsked);
        assert_eq!(asked, Bucket { rate: 1_250_000, burst: 536_870_911, limit: 536_902_161 });
        let most = made(u64::MAX, 8 * (u64::from(u32::MAX) - 1), Burst::AsAsked);
        assert_eq!((most.burst, most.limit), (u32::MAX - 1, u32::MAX));
        assert_eq!(made(u64::MAX, 8 * (u64::from(u32::MAX) - 1), Burst::Sane).limit, u32::MAX);
    }

    #[test]
    fn halves_and_excesses_are_refused() {
        let refused = |rate, burst| bucket(Asked { rate, burst }, MTU, Burst::Sane).unwrap_err();
        assert_eq!(refused(1_000_000, 0), ShapingError::NoBurst);
        assert_eq!(refused(0, 1_000_000), ShapingError::NoRate);
        assert_eq!(refused(1_000_000, 8 * u64::from(u32::MAX)), ShapingError::BurstTooLarge);
        assert_eq!(refused(7, 1_000_000), ShapingError::RateTooSmall(7));
        assert_eq!(bucket(Asked::default(), MTU, Burst::Sane), Ok(None));
    }
}
