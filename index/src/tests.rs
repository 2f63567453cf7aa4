//! The index against a plain map: whatever happens, it says the same, and no more.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;

const FORMS: [fn(u64) -> PrefixIndex; 2] = [PrefixIndex::new, PrefixIndex::of_single_blocks];

/// What each holder has, by name.
#[derive(Default)]
struct Model(HashMap<HolderId, HashSet<u64>>);

impl Model {
    fn find(&self, chain: &[u64]) -> Vec<Match> {
        let of = |(holder, blocks): (&HolderId, &HashSet<u64>)| {
            let length = chain.iter().take_while(|name| blocks.contains(name)).count() as u32;
            (length > 0).then_some(Match { holder: *holder, blocks: length })
        };
        let mut matches: Vec<Match> = self.0.iter().filter_map(of).collect();
        matches.sort_unstable_by(|a, b| b.blocks.cmp(&a.blocks).then(a.holder.cmp(&b.holder)));
        matches
    }

    fn pairs(&self) -> u64 {
        self.0.values().map(|blocks| blocks.len() as u64).sum()
    }
}

fn find(index: &PrefixIndex, chain: &[u64]) -> Vec<Match> {
    let mut matches = Vec::new();
    index.find(chain, &mut matches);
    assert!(matches.is_sorted_by_key(|found| std::cmp::Reverse(found.blocks)), "the longest first: {matches:?}");
    matches.sort_unstable_by(|a, b| b.blocks.cmp(&a.blocks).then(a.holder.cmp(&b.holder)));
    matches
}

/// The names of a chain: of its number, and a part that it shares with others.
fn chain(number: u64, shared: u64, blocks: u64) -> Vec<u64> {
    (0..blocks).map(|at| if at < shared { at + 1 } else { number * 10_000 + at + 1 }).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Store(usize, u64, u64, u64),
    Remove(usize, u64, u64, u64),
    Clear(usize),
    Replace(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let run = || (0..40usize, 0..6u64, 0..30u64, 1..30u64);
    prop_oneof![
        8 => run().prop_map(|(holder, number, from, blocks)| Step::Store(holder, number, from, blocks)),
        4 => run().prop_map(|(holder, number, from, blocks)| Step::Remove(holder, number, from, blocks)),
        1 => (0..40usize).prop_map(Step::Clear),
        1 => (0..40usize).prop_map(Step::Replace),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Random stores, removals (in the middle, too), losses, and holders that come and go.
    #[test]
    fn it_says_what_a_map_says(steps in prop::collection::vec(step(), 1..200)) {
        for form in FORMS {
        let index = form(64 << 20);
        let mut model = Model::default();
        // Some of many, so that what all have is said of more tags than a word has room for, and than a small cell.
        let many: Vec<HolderId> = (0..600).map(|_| index.add_holder().unwrap()).collect();
        let mut holders: Vec<HolderId> = many.into_iter().step_by(15).collect();
        holders.iter().for_each(|holder| _ = model.0.insert(*holder, HashSet::new()));
        for step in steps.clone() {
            let names = |number, from, blocks| chain(number, 8, 60)[from as usize..][..blocks as usize].to_vec();
            match step {
                Step::Store(at, number, from, blocks) => {
                    index.store(holders[at], &names(number, from, blocks));
                    model.0.get_mut(&holders[at]).unwrap().extend(names(number, from, blocks));
                }
                Step::Remove(at, number, from, blocks) => {
                    index.remove(holders[at], &names(number, from, blocks));
                    let blocks_of = model.0.get_mut(&holders[at]).unwrap();
                    names(number, from, blocks).iter().for_each(|name| _ = blocks_of.remove(name));
                }
                Step::Clear(at) => {
                    index.clear(holders[at]);
                    model.0.get_mut(&holders[at]).unwrap().clear();
                }
                Step::Replace(at) => {
                    index.remove_holder(holders[at]);
                    model.0.remove(&holders[at]);
                    holders[at] = index.add_holder().unwrap();
                    model.0.insert(holders[at], HashSet::new());
                }
            }
            for number in 0..6 {
                let asked = chain(number, 8, 60);
                prop_assert_eq!(find(&index, &asked), model.find(&asked));
            }
            let holder = holders[3];
            let asked = chain(2, 8, 60);
            let has: Vec<bool> = asked.iter().map(|name| model.0[&holder].contains(name)).collect();
            prop_assert_eq!(index.has(holder, &asked), has);
        }
        // All that was swept is gone.
        for _ in 0..1000 {
            index.store(holders[0], &[]);
        }
        prop_assert_eq!(index.status().pairs, model.pairs());
        }
    }
}

/// Splits by the hundred: what is there before one is there after it, and every byte is accounted for.
#[test]
fn growth_loses_nothing_and_needs_no_second_table() {
    let index = PrefixIndex::new(256 << 20);
    let holders: Vec<HolderId> = (0..100).map(|_| index.add_holder().unwrap()).collect();
    let names = |number: u64| chain(number, 0, 500);
    let mut most = 0.0f64;
    for number in 0..2000u64 {
        index.store(holders[number as usize % 100], &names(number));
        let status = index.status();
        if status.pairs > 900_000 {
            most = most.max(status.bytes as f64 / status.pairs as f64);
        }
    }
    assert_eq!(index.status().pairs, 1_000_000);
    assert_eq!((index.status().evicted, index.status().refused), (0, 0));
    for number in 0..2000u64 {
        let expected = Match { holder: holders[number as usize % 100], blocks: 500 };
        assert_eq!(find(&index, &names(number)), [expected], "{number}");
    }
    // Of a million; in ten million it is less (benches/RESULTS.md).
    assert!(most < 64.0, "{most} bytes a pair at worst");
    for number in 0..2000u64 {
        index.remove(holders[number as usize % 100], &names(number));
    }
    assert_eq!((index.status().pairs, index.status().blocks), (0, 0));
}

/// At its bound it gives up what nobody looks up, and stays within it.
#[test]
fn the_bound_holds_and_what_is_looked_up_stays() {
    let index = PrefixIndex::new(4 << 20);
    let holder = index.add_holder().unwrap();
    let wanted: Vec<Vec<u64>> = (0..20).map(|number| chain(number, 0, 200)).collect();
    wanted.iter().for_each(|names| index.store(holder, names));
    for number in 100..4000u64 {
        index.store(holder, &chain(number, 0, 200));
        find(&index, &wanted[number as usize % 20]);
    }
    let status = index.status();
    assert!(status.evicted > 100_000 && status.bytes <= status.bytes_max && status.bytes_max <= 5 << 20, "{status:?}");
    let there = |names: &Vec<u64>| index.has(holder, names).iter().filter(|has| **has).count();
    let kept: usize = wanted.iter().map(there).sum();
    assert!(kept >= 3950, "{kept} of 4000 blocks that are looked up all the time");
    assert!(status.blocks > 100_000, "{status:?}");
}

/// One block that everybody has, and everybody loses: through words, lists and bits, up and down.
#[test]
fn sets_grow_and_shrink() {
    let index = PrefixIndex::new(64 << 20);
    let holders: Vec<HolderId> = (0..caps::HOLDERS_MAX).map(|_| index.add_holder().unwrap()).collect();
    assert_eq!(index.add_holder(), Err(TooManyHolders));
    for (at, holder) in holders.iter().enumerate() {
        index.store(*holder, &[1, 2]);
        if at < 40 || at % 500 == 0 {
            assert_eq!(find(&index, &[1, 2, 3]).len(), at + 1);
        }
    }
    assert_eq!(index.status().pairs, 2 * caps::HOLDERS_MAX as u64);
    // With every tag in use, one that restarts still gets another.
    index.clear(holders[7]);
    assert!(find(&index, &[1]).iter().all(|found| found.holder != holders[7]));
    index.store(holders[7], &[1]);
    assert_eq!(index.has(holders[7], &[1, 2]), [true, false]);
    for (at, holder) in holders.iter().enumerate() {
        index.remove(*holder, &[1, 2]);
        let left = caps::HOLDERS_MAX - at - 1;
        if left < 40 || at % 500 == 0 {
            assert_eq!(find(&index, &[1]).len(), left, "{at}");
        }
    }
    assert_eq!((index.status().pairs, index.status().blocks), (0, 0));
}

/// Readers beside a writer see what was there before or after each change, and never what no holder ever had: here each holder has
/// chains of its own, all of one length or none.
#[test]
fn readers_make_nothing_up() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let index = PrefixIndex::new(8 << 20);
    let holders: Vec<HolderId> = (0..64).map(|_| index.add_holder().unwrap()).collect();
    let stop = AtomicBool::new(false);
    // Chain `number` is only ever stored by holders of the same remainder, up to block 50 + number % 7.
    let length = |number: u64| 50 + number % 7;
    std::thread::scope(|scope| {
        for reader in 0..3u64 {
            let (index, holders, stop) = (&index, &holders, &stop);
            scope.spawn(move || {
                let mut matches = Vec::new();
                let mut looks = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let number = (looks * 31 + reader) % 500;
                    index.find(&chain(number, 0, 80), &mut matches);
                    for found in &matches {
                        let at = holders.iter().position(|holder| *holder == found.holder).unwrap() as u64;
                        assert_eq!(at % 8, number % 8, "a block that {at} never had, of chain {number}");
                        assert!(u64::from(found.blocks) <= length(number), "{found:?} of chain {number}");
                    }
                    looks += 1;
                }
                assert!(looks > 100);
            });
        }
        let mut random = 1u64;
        for step in 0..60_000u64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let number = (random >> 33) % 500;
            let holder = holders[((random >> 13) % 8 * 8 + number % 8) as usize];
            let names = chain(number, 0, length(number));
            match step % 4 {
                3 => index.remove(holder, &names),
                _ => index.store(holder, &names),
            }
            if step % 1000 == 0 {
                index.clear(holder);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// The same in engines' own words: what a holder stored by its hashes is found by the router's names, and what it says left is gone;
/// hashes of blocks that nobody has are forgotten, however they were lost.
#[test]
fn engines_hashes_are_understood_and_forgotten() {
    let index = PrefixIndex::with_opaque_names(64 << 20);
    let holders: Vec<HolderId> = (0..4).map(|_| index.add_holder().unwrap()).collect();
    let tokens =
        |number: u64| -> Vec<u64> { (0..50).map(|at| if at < 10 { at + 1 } else { number * 1000 + at }).collect() };
    let names = |number: u64| {
        let mut names = Vec::new();
        crate::names::chain_names(&tokens(number), &mut names);
        names
    };
    let opaque = |name: u64| !name.rotate_left(5);
    let run = |number: u64| -> Vec<(u64, u64)> {
        names(number).iter().map(|name| opaque(*name)).zip(tokens(number)).collect()
    };
    for number in 0..200u64 {
        let (holder, run) = (holders[number as usize % 4], run(number));
        index.store_opaque(holder, 7, None, &run[..20]).unwrap();
        index.store_opaque(holder, 7, Some(run[19].0), &run[20..]).unwrap();
    }
    for number in 0..200u64 {
        let found = find(&index, &names(number));
        assert_eq!(found[0], Match { holder: holders[number as usize % 4], blocks: 50 });
        assert!(found[1..].iter().all(|found| found.blocks == 10) && found.len() == 4, "all have the shared part");
        let mut by_tokens = Vec::new();
        index.find_tokens(&tokens(number), &mut by_tokens);
        assert_eq!((by_tokens[0], by_tokens.len()), (found[0], 4), "named on the way");
    }
    assert_eq!(index.store_opaque(holders[0], 7, Some(12345), &run(1)), Err(UnknownParent(12345)));
    assert_eq!(index.store_opaque(holders[0], 8, Some(run(1)[3].0), &run(1)), Err(UnknownParent(run(1)[3].0)));
    // One hash for two blocks: the second is not taken.
    index.store_opaque(holders[0], 7, None, &[(run(1)[40].0, 999)]).unwrap();
    assert_eq!((find(&index, &[999]), index.status().refused), (Vec::new(), 1));
    for number in (0..200u64).filter(|number| number % 4 == 1) {
        let hashes: Vec<u64> = run(number).iter().rev().map(|(hash, _)| *hash).collect();
        index.remove_opaque(holders[1], 7, &hashes[..30]);
        assert_eq!(find(&index, &names(number))[0].blocks, 20);
    }
    index.clear(holders[0]);
    [1, 2, 3].iter().for_each(|at| index.remove_holder(holders[*at]));
    for _ in 0..100 {
        index.store(holders[0], &[]);
    }
    assert_eq!((index.status().pairs, index.status().blocks), (0, 0));
    let Form::Runs(runs) = &index.0 else { panic!("engines' hashes are understood in runs") };
    assert_eq!(runs.hashes_len(), 0, "hashes that mean nothing are forgotten");
}

/// What a look-up works out of long chains' tokens, group by group, and a later one goes by: each is as long as its own tokens say, whatever
/// was said of others, and of the memory that its blocks lie in.
#[test]
fn what_was_said_of_tokens_is_so_of_no_others() {
    let index = PrefixIndex::with_opaque_names(64 << 20);
    let holder = index.add_holder().unwrap();
    let chain = |first: u64, parted: usize| -> Vec<u64> {
        let token = |at: usize| if at == 0 { first } else { at as u64 + if at == parted { 5000 } else { 0 } };
        (0..500).map(token).collect()
    };
    let named = |tokens: &[u64]| -> Vec<u64> {
        let mut names = Vec::new();
        crate::names::chain_names(tokens, &mut names);
        names
    };
    let blocks_of = |tokens: &[u64]| {
        let mut matches = Vec::new();
        index.find_tokens(tokens, &mut matches);
        matches.first().map_or(0, |found| found.blocks)
    };
    for first in 1001..1008 {
        let run: Vec<(u64, u64)> =
            named(&chain(first, 0)).iter().map(|name| !name).zip(chain(first, 0).iter().copied()).collect();
        // In pieces, so that groups end anywhere in what was stored at once.
        for (at, part) in run.chunks(90).enumerate() {
            let parent = (at * 90).checked_sub(1).map(|before| run[before].0);
            index.store_opaque(holder, 1, parent, part).unwrap();
        }
        for _ in 0..3 {
            assert_eq!(blocks_of(&chain(first, 0)), 500);
            for parted in (1..500).step_by(7) {
                assert_eq!(blocks_of(&chain(first, parted)), parted as u32);
            }
            assert_eq!(blocks_of(&chain(first + 1, 0)), 0);
        }
        // A hole in the middle, and then the whole chain leaves: the next one gets its places.
        let hashes: Vec<u64> = run.iter().map(|(hash, _)| *hash).collect();
        index.remove_opaque(holder, 1, &hashes[250..260]);
        assert_eq!(blocks_of(&chain(first, 0)), 250);
        index.store_opaque(holder, 1, Some(hashes[249]), &run[250..260]).unwrap();
        assert_eq!(blocks_of(&chain(first, 0)), 500);
        assert_eq!(blocks_of(&chain(first, 300)), 300);
        let back: Vec<u64> = hashes.into_iter().rev().collect();
        index.remove_opaque(holder, 1, &back);
        assert_eq!(blocks_of(&chain(first, 0)), 0);
    }
    assert_eq!(index.status().blocks, 0);
}

/// A block leaves in the middle of a chain, and comes back: the chain is as long as it is.
#[test]
fn a_chain_is_as_long_as_its_first_hole_lets_it() {
    let index = PrefixIndex::new(8 << 20);
    let holder = index.add_holder().unwrap();
    let names = chain(1, 0, 100);
    for opened in 1..99 {
        index.clear(holder);
        index.store(holder, &names[..opened]);
        index.store(holder, &names[opened + 1..]);
        assert_eq!(find(&index, &names)[0].blocks, opened as u32);
        index.store(holder, &names[opened..=opened]);
        assert_eq!(find(&index, &names)[0].blocks, 100);
        index.remove(holder, &names[opened..=opened]);
        assert_eq!(find(&index, &names)[0].blocks, opened as u32);
    }
    let mut seen = Vec::new();
    index.each(&names, |at, holders| {
        seen.extend((!holders.is_empty()).then_some(at));
        at < 99
    });
    assert_eq!(seen, (0..98).chain([99]).collect::<Vec<_>>());
}

/// An engine that says the same again and again, or removes what it does not have, or the same twice, costs nothing.
#[test]
fn what_is_said_again_takes_no_memory() {
    let index = PrefixIndex::with_opaque_names(8 << 20);
    let holder = index.add_holder().unwrap();
    let names = chain(1, 0, 20);
    let say = || {
        index.store(holder, &names[10..]);
        index.remove(holder, &names[9..10]);
        index.store_opaque(holder, 1, None, &[(5, 6), (7, 8)]).unwrap();
        index.remove_opaque(holder, 1, &[5, 5, 7, 7, 9]);
    };
    say();
    let status = index.status();
    (0..10_000).for_each(|_| say());
    assert_eq!(index.status(), status);
    index.remove(holder, &names[10..]);
    assert_eq!((index.status().pairs, index.status().blocks), (0, 0));
    index.store_opaque(holder, 1, None, &(0..3000).map(|at| (at, at + 1)).collect::<Vec<_>>()).unwrap();
    assert_eq!(index.status().blocks, 3000, "units know how full they are");
}

#[derive(Clone, Debug)]
enum OpaqueStep {
    Store(usize, u64, usize, usize),
    Remove(usize, u64, usize, usize, bool),
    /// By names, in the same index.
    StoreNamed(usize, u64, usize, usize),
    RemoveNamed(usize, u64, usize, usize),
    Clear(usize),
    Replace(usize),
}

fn opaque_step() -> impl Strategy<Value = OpaqueStep> {
    let part = || (0..12usize, 0..5u64, 0..40usize, 1..40usize);
    prop_oneof![
        30 => part().prop_map(|(holder, number, from, blocks)| OpaqueStep::Store(holder, number, from, blocks)),
        10 => part().prop_map(|(holder, number, _, blocks)| OpaqueStep::Store(holder, number, 0, 20 + blocks)),
        30 => (part(), any::<bool>())
            .prop_map(|((holder, number, from, blocks), back)| OpaqueStep::Remove(holder, number, from, blocks, back)),
        1 => part().prop_map(|(holder, number, from, blocks)| OpaqueStep::StoreNamed(holder, number, from, blocks)),
        1 => part().prop_map(|(holder, number, from, blocks)| OpaqueStep::RemoveNamed(holder, number, from, blocks)),
        2 => (0..12usize).prop_map(OpaqueStep::Clear),
        2 => (0..12usize).prop_map(OpaqueStep::Replace),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// The same by engines' hashes, of which there are up to three for each block: most names are in no map, and are found all the same.
    #[test]
    fn it_says_what_a_map_says_of_engines_hashes(
        steps in prop::collection::vec(opaque_step(), 1..150),
        domains in 1..4usize,
    ) {
        let index = PrefixIndex::with_opaque_names(64 << 20);
        let mut model = Model::default();
        let mut holders: Vec<HolderId> = (0..12).map(|_| index.add_holder().unwrap()).collect();
        holders.iter().for_each(|holder| _ = model.0.insert(*holder, HashSet::new()));
        // Chains part at different places.
        let tokens: Vec<Vec<u64>> = (0..5u64)
            .map(|number| (0..80).map(|at| if at < number * 9 { at + 1 } else { number * 1000 + at }).collect())
            .collect();
        let chains: Vec<Vec<u64>> = tokens
            .iter()
            .map(|tokens| {
                let mut names = Vec::new();
                crate::names::chain_names(tokens, &mut names);
                names
            })
            .collect();
        let hash = |holder: usize, name: u64| !name.rotate_left(5 + (holder % domains) as u32);
        for step in steps {
            match step {
                OpaqueStep::Store(at, number, from, blocks) => {
                    let number = number as usize;
                    let names = &chains[number][from..][..blocks];
                    let run: Vec<(u64, u64)> =
                        names.iter().map(|name| hash(at, *name)).zip(tokens[number][from..].iter().copied()).collect();
                    let parent = from.checked_sub(1).map(|before| hash(at, chains[number][before]));
                    // What an event stands behind may be unknown: nobody has it, or its hash was never said.
                    let is_known = parent.is_some_and(|parent| index.has_opaque(holders[at], (at % domains) as u64, &[parent])[0]);
                    if index.store_opaque(holders[at], (at % domains) as u64, parent, &run).is_ok() {
                        model.0.get_mut(&holders[at]).unwrap().extend(names);
                    } else {
                        prop_assert!(from > 0 && !is_known);
                    }
                }
                OpaqueStep::Remove(at, number, from, blocks, back) => {
                    let names = &chains[number as usize][from..][..blocks];
                    let mut hashes: Vec<u64> = names.iter().map(|name| hash(at, *name)).collect();
                    if back {
                        hashes.reverse();
                    }
                    // Holders of one domain say which blocks they lose; what they stored by names they do not know by hashes.
                    let known = index.has_opaque(holders[at], (at % domains) as u64, &hashes);
                    index.remove_opaque(holders[at], (at % domains) as u64, &hashes);
                    let blocks_of = model.0.get_mut(&holders[at]).unwrap();
                    let names = names.iter().copied();
                    let names: Vec<u64> = if back { names.rev().collect() } else { names.collect() };
                    names.iter().zip(known).filter(|(_, known)| *known).for_each(|(name, _)| _ = blocks_of.remove(name));
                }
                OpaqueStep::StoreNamed(at, number, from, blocks) => {
                    let names = &chains[number as usize][from..][..blocks];
                    index.store(holders[at], names);
                    model.0.get_mut(&holders[at]).unwrap().extend(names);
                }
                OpaqueStep::RemoveNamed(at, number, from, blocks) => {
                    let names = &chains[number as usize][from..][..blocks];
                    index.remove(holders[at], names);
                    let blocks_of = model.0.get_mut(&holders[at]).unwrap();
                    names.iter().for_each(|name| _ = blocks_of.remove(name));
                }
                OpaqueStep::Clear(at) => {
                    index.clear(holders[at]);
                    model.0.get_mut(&holders[at]).unwrap().clear();
                }
                OpaqueStep::Replace(at) => {
                    index.remove_holder(holders[at]);
                    model.0.remove(&holders[at]);
                    holders[at] = index.add_holder().unwrap();
                    model.0.insert(holders[at], HashSet::new());
                }
            }
            for (chain, tokens) in chains.iter().zip(&tokens) {
                let found = find(&index, chain);
                prop_assert_eq!(&found, &model.find(chain));
                let mut by_tokens = Vec::new();
                index.find_tokens(tokens, &mut by_tokens);
                by_tokens.sort_unstable_by(|a, b| b.blocks.cmp(&a.blocks).then(a.holder.cmp(&b.holder)));
                prop_assert_eq!(&by_tokens, &found);
                let holder = holders[chain.len() % 12];
                let has: Vec<bool> = chain.iter().map(|name| model.0[&holder].contains(name)).collect();
                prop_assert_eq!(index.has(holder, chain), has);
            }
        }
        for _ in 0..1000 {
            index.store(holders[0], &[]);
        }
        prop_assert_eq!(index.status().pairs, model.pairs());
        holders.iter().for_each(|holder| index.remove_holder(*holder));
        let last = index.add_holder().unwrap();
        for _ in 0..1000 {
            index.store(last, &[]);
        }
        prop_assert_eq!((index.status().pairs, index.status().blocks), (0, 0));
        let Form::Runs(runs) = &index.0 else { panic!("engines' hashes are understood in runs") };
        prop_assert_eq!((runs.hashes_len(), runs.names_len()), (0, 0), "what means nothing is forgotten");
    }
}
