//! Pins of one volume: which blocks may not be dropped, until when, and the record that survives a restart.

use std::collections::{BTreeSet, HashMap};

use super::format::VOLUME_VERSION;
use crate::block::Digest;
use crate::caps;
use crate::clock::BootTime;

/// One pin or ticket.
struct Pin {
    digests: Vec<Digest>,
    expires: BootTime,
    /// Written to the index.
    lasting: bool,
}

/// See the head of this file.
#[derive(Default)]
pub(super) struct Pins {
    by_id: HashMap<u128, Pin>,
    by_expiry: BTreeSet<(BootTime, u128)>,
    counts: HashMap<Digest, u32>,
    /// Blocks that all pins name, each as often as it is named.
    names: usize,
}

impl Pins {
    /// True while a pin names the block, be it here or not.
    pub fn holds(&self, digest: Digest) -> bool {
        self.counts.contains_key(&digest)
    }

    /// True where there is none.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// True where a pin of this many blocks is within the bounds on pins.
    pub fn has_room(&self, blocks: usize) -> bool {
        self.by_id.len() < caps::HOLDS_MAX && self.names + blocks <= caps::HELD_KEYS_MAX
    }

    /// Starts a pin; the blocks that no other pin named before.
    pub fn add(&mut self, id: u128, digests: Vec<Digest>, expires: BootTime, lasting: bool) -> Vec<Digest> {
        let mut fresh = Vec::new();
        for digest in &digests {
            let count = self.counts.entry(*digest).or_insert(0);
            if *count == 0 {
                fresh.push(*digest);
            }
            *count += 1;
        }
        self.names += digests.len();
        self.by_expiry.insert((expires, id));
        self.by_id.insert(id, Pin { digests, expires, lasting });
        fresh
    }

    /// Ends one: the blocks that no pin names any more. `None` where there is none that lasts, or does not, as this says.
    pub fn end(&mut self, id: u128, lasting: bool) -> Option<Vec<Digest>> {
        self.by_id.get(&id).filter(|pin| pin.lasting == lasting)?;
        let pin = self.by_id.remove(&id)?;
        self.by_expiry.remove(&(pin.expires, id));
        self.names -= pin.digests.len();
        let mut freed = Vec::new();
        for digest in pin.digests {
            if let Some(count) = self.counts.get_mut(&digest) {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(&digest);
                    freed.push(digest);
                }
            }
        }
        Some(freed)
    }

    /// Pins that survive a restart.
    pub fn lasting(&self) -> impl Iterator<Item = u128> {
        self.by_id.iter().filter(|(_, pin)| pin.lasting).map(|(id, _)| *id)
    }

    /// The next pin whose time is over, and whether it lasts.
    pub fn next_expired(&self, now: BootTime) -> Option<(u128, bool)> {
        let (_, id) = self.by_expiry.first().filter(|(expires, _)| *expires <= now)?;
        self.by_id.get(id).map(|pin| (*id, pin.lasting))
    }

    /// Every lasting pin, as its record: for an index that is made anew.
    pub fn records(&self, boot_id: &[u8; 16], now: BootTime) -> Vec<(u128, Vec<u8>)> {
        let lasting = self.by_id.iter().filter(|(_, pin)| pin.lasting);
        lasting.map(|(id, pin)| (*id, record(&pin.digests, pin.expires, boot_id, now))).collect()
    }

    /// Reads a pin back. In another boot its clock has begun anew: it gets the time again that it had left.
    pub fn restore(&mut self, id: u128, record: &[u8], boot_id: &[u8; 16], now: BootTime) {
        let Some((head, digests)) = record.split_at_checked(HEAD_BYTES) else { return };
        let u64_at = |at: usize| head.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
        if head.first() != Some(&(VOLUME_VERSION as u8)) {
            return;
        }
        let same_boot = head.get(1..17) == Some(boot_id.as_slice());
        let expires = if same_boot { BootTime(u64_at(17)) } else { now.plus_ms(u64_at(25)) };
        let digests = digests.as_chunks::<16>().0.iter().map(|bytes| Digest(u128::from_le_bytes(*bytes))).collect();
        self.add(id, digests, expires, true);
    }
}

/// Version, boot id, time of expiry in that boot, and time left when it was written, in milliseconds.
const HEAD_BYTES: usize = 1 + 16 + 8 + 8;

/// A pin as the index keeps it.
pub(super) fn record(digests: &[Digest], expires: BootTime, boot_id: &[u8; 16], now: BootTime) -> Vec<u8> {
    let mut out = vec![VOLUME_VERSION as u8];
    out.extend_from_slice(boot_id);
    out.extend_from_slice(&expires.0.to_le_bytes());
    out.extend_from_slice(&expires.ms_since(now).to_le_bytes());
    digests.iter().for_each(|digest| out.extend_from_slice(&digest.0.to_le_bytes()));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_held_until_its_last_pin_ends() {
        let mut pins = Pins::default();
        let [a, b] = [Digest(1), Digest(2)];
        assert_eq!(pins.add(10, vec![a, b], BootTime(100), true), [a, b]);
        assert_eq!(pins.add(11, vec![b], BootTime(50), false), []);
        assert_eq!(pins.next_expired(BootTime(49)), None);
        assert_eq!(pins.next_expired(BootTime(50)), Some((11, false)));
        assert_eq!(pins.end(11, true), None, "a ticket is no pin");
        assert_eq!(pins.end(11, false), Some(vec![]));
        assert!(pins.holds(b));
        assert_eq!(pins.end(10, true), Some(vec![a, b]));
        assert!(!pins.holds(a));
        assert_eq!(pins.end(10, true), None);
    }

    /// Boot clocks start anew: a pin must neither last for ever nor end at once after a reboot.
    #[test]
    fn a_pin_keeps_its_time_over_a_restart_and_a_reboot() {
        let bytes = record(&[Digest(7)], BootTime(5000), &[1; 16], BootTime(4000));
        let mut same = Pins::default();
        same.restore(1, &bytes, &[1; 16], BootTime(4500));
        assert!(same.holds(Digest(7)));
        assert_eq!((same.next_expired(BootTime(4999)), same.next_expired(BootTime(5000))), (None, Some((1, true))));
        let mut rebooted = Pins::default();
        rebooted.restore(1, &bytes, &[2; 16], BootTime(10));
        assert_eq!(
            (rebooted.next_expired(BootTime(1009)), rebooted.next_expired(BootTime(1010))),
            (None, Some((1, true)))
        );
        assert_eq!(rebooted.records(&[2; 16], BootTime(10)).len(), 1);
        rebooted.restore(2, &bytes[..20], &[2; 16], BootTime(10));
        assert_eq!(rebooted.records(&[2; 16], BootTime(10)).len(), 1, "half a record is no pin");
    }

    /// A record as version 1 writes it, which later builds must read.
    #[test]
    fn pin_record_version_1() {
        let mut sample = vec![1];
        sample.extend([7; 16]);
        sample.extend([0x88, 0x13, 0, 0, 0, 0, 0, 0, 0xE8, 3, 0, 0, 0, 0, 0, 0]);
        sample.extend((1..=32).collect::<Vec<u8>>());
        let digests =
            [0x100F_0E0D_0C0B_0A09_0807_0605_0403_0201, 0x201F_1E1D_1C1B_1A19_1817_1615_1413_1211].map(Digest);
        assert_eq!(record(&digests, BootTime(5000), &[7; 16], BootTime(4000)), sample, "it is written differently now");
        let mut pins = Pins::default();
        pins.restore(1, &sample, &[7; 16], BootTime(4500));
        assert!(digests.iter().all(|digest| pins.holds(*digest)));
        assert_eq!(pins.next_expired(BootTime(5000)), Some((1, true)));
    }
}
