//! Damaged disks: quorum corrects the data of a damaged child, blkverify finds the damage, and no format spreads it.

use oxblk_core::{Backend, Errno, OpenFlags, Options, WriteFlags};
use oxblk_ring::IoBufMut;
use oxblk_ring::sim::{self, Damage, DamageRule, Disk, Faults};
use oxblk_tests::formats::variants;
use oxblk_tests::model::chain;
use oxblk_tests::model::ops::content;
use oxblk_tests::random::Random;
use oxblk_tests::sim_disk::{self, Pace};
use oxblk_tests::{hostile, scaled};

const SIZE: u64 = 64 << 10;
const SECTORS: u64 = SIZE / 512;

/// Opens a node above disks with the names `a`, `b` and so on.
async fn open(disks: &[Disk], options: &str) -> Backend {
    let graph = chain::graph();
    for (name, disk) in ["a", "b", "c"].into_iter().zip(disks) {
        let node = sim_disk::add(&graph, name, disk, false, Pace::AtOnce).expect("a new name");
        graph.keep_open(node).expect("a node");
    }
    let options = Options::from_dotted(options, None).expect("options");
    graph.open_backend(None, options, OpenFlags::default()).await.expect("it opens")
}

fn disks(seed: u64, count: u64) -> Vec<Disk> {
    (0..count).map(|number| Disk::new(seed ^ number << 8, SIZE)).collect()
}

fn damage(chance: f64, kinds: &[Damage]) -> Faults {
    let rule = |damage: &Damage| DamageRule { chance, ..DamageRule::always(*damage) };
    Faults { damage: kinds.iter().map(rule).collect(), ..Faults::default() }
}

async fn write(disk: &Backend, sector: u64, seed: u64) -> oxblk_core::Result<()> {
    let data = content(seed, sector * 512, 512);
    disk.write(sector * 512, data.into(), WriteFlags::empty()).await
}

async fn read(disk: &Backend, sector: u64) -> oxblk_core::Result<IoBufMut> {
    disk.read(sector * 512, IoBufMut::new(512)).await
}

#[test]
fn a_quorum_returns_right_data_although_one_child_is_damaged_and_corrects_it() {
    const OPTIONS: &str = "driver=quorum,vote-threshold=2,rewrite-corrupted=on,\
                           children.0=a,children.1=b,children.2=c";
    let kinds = [
        Damage::Corruption,
        Damage::LatentError,
        Damage::MisdirectedWrite { to: None },
        Damage::MisdirectedRead { from: None },
    ];
    let mut damaged = 0;
    for seed in 0..scaled(12) {
        let disks = disks(seed, 3);
        let victim = &disks[usize::try_from(seed % 3).expect("a small number")];
        victim.set_faults(damage(0.1, &kinds));
        sim::run(seed, async {
            let mut random = Random::new(seed);
            let quorum = open(&disks, OPTIONS).await;
            let mut seeds = vec![None; usize::try_from(SECTORS).expect("a small number")];
            for turn in 1..300 {
                let sector = random.below(SECTORS);
                let known = &mut seeds[usize::try_from(sector).expect("a small number")];
                if random.one_in(2) {
                    write(&quorum, sector, turn).await.expect("a write");
                    *known = Some(turn);
                } else {
                    let expected =
                        known.map_or(vec![0; 512], |seed| content(seed, sector * 512, 512));
                    let got = read(&quorum, sector).await.expect("a read");
                    assert_eq!(got[..], expected[..], "seed {seed}, sector {sector}");
                }
            }
            damaged += victim.damaged();
            victim.set_faults(Faults::default());
            for sector in 0..SECTORS {
                read(&quorum, sector).await.expect("a read");
            }
            // A read error is not corrected, so write the sectors that cannot be read.
            for sector in 0..SECTORS {
                let node = disks.iter().position(|disk| std::ptr::eq(disk, victim));
                let direct = open(&disks[node.expect("a child")..][..1], "driver=raw,file=a").await;
                if let Err(error) = read(&direct, sector).await {
                    assert_eq!(error.raw_errno(), Errno::IO);
                    write(&direct, sector, 1).await.expect("a write");
                }
                chain::close(direct).await.expect("it closes");
                read(&quorum, sector).await.expect("a read");
            }
            chain::close(quorum).await.expect("it closes");
            assert!(disks.iter().all(|disk| disk.bytes() == disks[0].bytes()), "seed {seed}");
        });
    }
    assert!(damaged > 100, "only {damaged} requests were damaged");
}

#[test]
fn blkverify_reports_each_damaged_sector_that_is_read() {
    for (seed, kind) in [Damage::Corruption, Damage::MisdirectedWrite { to: None }]
        .into_iter()
        .flat_map(|kind| (0..4).map(move |seed| (seed, kind)))
    {
        for victim in 0..2 {
            let disks = disks(seed, 2);
            disks[victim].set_faults(damage(0.2, &[kind]));
            sim::run(seed, async {
                let verify = open(&disks, "driver=blkverify,raw=a,test=b").await;
                for sector in 0..SECTORS {
                    write(&verify, sector, seed * 1000 + sector * 2 + 1).await.expect("a write");
                }
                assert!(disks[victim].damaged() > 0);
                let bytes = [disks[0].bytes(), disks[1].bytes()];
                for (sector, at) in (0..SECTORS).zip((0..bytes[0].len()).step_by(512)) {
                    let is_same = bytes[0][at..at + 512] == bytes[1][at..at + 512];
                    match read(&verify, sector).await {
                        Ok(_) => assert!(is_same, "seed {seed}, sector {sector}"),
                        Err(error) => {
                            assert!(!is_same, "seed {seed}, sector {sector}: {error}");
                            let offset = sector * 512;
                            let text = format!("blkverify: read offset={offset} bytes=512");
                            assert!(error.to_string().contains(&text), "{error}");
                        }
                    }
                }
                chain::close(verify).await.expect("it closes");
            });
        }
    }
}

#[test]
fn an_unreadable_sector_fails_only_the_requests_that_need_it() {
    let (mut refused, mut failed, mut completed) = (0, 0, 0);
    let mut failures = Vec::new();
    for variant in variants() {
        for seed in 1..=scaled(1) {
            match std::panic::catch_unwind(|| hostile::medium::latent_error(variant, seed)) {
                Ok(outcome) => {
                    refused += outcome.refused;
                    failed += outcome.failed;
                    completed += outcome.completed;
                }
                Err(panic) => failures.push(oxblk_tests::panic_text(&*panic)),
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    let counts = format!("{refused} refused, {failed} failed, {completed} completed");
    assert!(refused > 0 && failed > 0 && completed > failed, "{counts}");
}

#[test]
fn no_request_to_an_image_on_a_disk_that_damages_data_panics_or_waits_forever() {
    let mut failures = Vec::new();
    for variant in variants() {
        for seed in 1..=scaled(2) {
            let outcome = std::panic::catch_unwind(|| hostile::medium::wrong_data(variant, seed));
            failures.extend(outcome.err().map(|panic| oxblk_tests::panic_text(&*panic)));
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
