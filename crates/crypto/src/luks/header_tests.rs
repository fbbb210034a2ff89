//! Tests of LUKS headers: creating, parsing, and refusing corrupt headers.

use proptest::prelude::*;

use super::*;
use crate::luks::Recipe;
use crate::secret::Secret;

fn recipe(cipher: BlockCipher, mode: Mode, iv: IvGenerator, hash: Hash) -> Recipe {
    Recipe { suite: Suite { cipher, mode, iv }, hash, iter_time: 0 }
}

fn usual() -> Recipe {
    recipe(BlockCipher::Aes256, Mode::Xts, IvGenerator::Plain64, Hash::Sha256)
}

#[test]
fn a_new_header_parses_again_and_its_password_opens_it() {
    let recipes = [
        usual(),
        recipe(BlockCipher::Aes192, Mode::Cbc, IvGenerator::Essiv(Hash::Sha256), Hash::Sha1),
        recipe(BlockCipher::Cast5, Mode::Ctr, IvGenerator::Plain, Hash::Ripemd160),
        recipe(BlockCipher::Twofish192, Mode::Xts, IvGenerator::Plain64, Hash::Sha512),
    ];
    for recipe in recipes {
        let created = recipe.create(b"sesame").unwrap();
        let header = Header::parse(&created.header.encode()).unwrap();
        assert_eq!(header, created.header);
        assert_eq!(header.uuid().len(), 36);
        let material = Secret::from_slice(&created.material);
        let key = header.unlock(0, b"sesame", material.clone()).unwrap();
        assert_eq!(key, Some(created.key));
        assert_eq!(header.unlock(0, b"simsim", material.clone()).unwrap(), None);
        assert_eq!(header.unlock(1, b"sesame", material).unwrap(), None);
    }
}

#[test]
fn a_second_slot_holds_the_same_key_under_another_password() {
    let created = usual().create(b"one").unwrap();
    let mut header = created.header;
    let (slot, material) = header.seal(5, b"two", &created.key, 0).unwrap();
    header.slots[5] = slot;
    let header = Header::parse(&header.encode()).unwrap();
    assert_eq!(header.active_slots().map(|(index, _)| index).collect::<Vec<_>>(), [0, 5]);
    let material = Secret::new(material);
    assert_eq!(header.unlock(5, b"two", material.clone()).unwrap(), Some(created.key));
    assert_eq!(header.unlock(5, b"one", material).unwrap(), None);
    assert!(!header.slots[5].erased().active);
}

#[test]
fn slots_of_an_aes_256_xts_header_have_the_offsets_that_qemu_uses() {
    let header = usual().create(b"x").unwrap().header;
    let offsets: Vec<_> = header.slots.iter().map(|s| s.material(header.suite).start).collect();
    assert_eq!(offsets[..3], [4096, 262_144, 520_192]);
    assert_eq!(header.payload_offset(), 2_068_480);
}

fn refused(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut bytes = usual().create(b"x").unwrap().header.encode();
    change(&mut bytes);
    Header::parse(&bytes).unwrap_err().to_string()
}

fn put(at: usize, value: u32) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes())
}

fn name(at: usize, text: &'static str) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| {
        bytes[at..at + 32].fill(0);
        bytes[at..at + text.len()].copy_from_slice(text.as_bytes());
    }
}

#[test]
fn invalid_headers_are_refused_with_the_messages_of_qemus_tools() {
    const LONG: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    assert_eq!(refused(put(0, 0)), "Volume is not in LUKS format");
    assert_eq!(refused(|bytes| bytes.truncate(591)), "Volume is not in LUKS format");
    assert_eq!(refused(|bytes| bytes[7] = 2), "LUKS version 2 is not supported");
    assert_eq!(refused(name(8, "foo")), "Algorithm 'foo' with key size 32 bytes not supported");
    assert_eq!(refused(name(8, LONG)), "LUKS header cipher name is not NUL terminated");
    assert_eq!(refused(name(40, LONG)), "LUKS header cipher mode is not NUL terminated");
    assert_eq!(refused(name(72, LONG)), "LUKS header hash spec is not NUL terminated");
    assert_eq!(refused(name(40, "xts")), "Unexpected cipher mode string format 'xts'");
    assert_eq!(refused(name(40, "foo-plain")), "Cipher mode 'foo' not supported");
    assert_eq!(refused(name(40, "xts-foo")), "IV generator 'foo' not supported");
    assert_eq!(refused(name(40, "cbc-essiv:foo")), "Hash algorithm 'foo' not supported");
    assert_eq!(refused(name(72, "SHA256")), "Hash algorithm 'SHA256' not supported");
    assert_eq!(refused(put(104, 0)), "LUKS payload is overlapping with the header");
    assert_eq!(refused(put(104, 8)), "Keyslot 0 is overlapping with the encrypted payload");
    assert_eq!(refused(put(108, 0)), "Algorithm 'aes' with key size 0 bytes not supported");
    assert_eq!(
        refused(put(108, 0x7fff_ffff)),
        "Keyslot 0 is overlapping with the encrypted payload"
    );
    assert_eq!(refused(put(164, 0)), "LUKS key iteration count is zero");
}

#[test]
fn invalid_key_slots_are_refused_with_the_messages_of_qemus_tools() {
    assert_eq!(refused(put(208, 1)), "Keyslot 0 state (active/disable) is corrupted");
    assert_eq!(refused(put(212, 0)), "Keyslot 0 iteration count is zero");
    assert_eq!(refused(put(248, 1)), "Keyslot 0 is overlapping with the LUKS header");
    assert_eq!(refused(put(248, u32::MAX)), "Keyslot 0 is overlapping with the encrypted payload");
    assert_eq!(refused(put(248, 512)), "Keyslots 0 and 1 are overlapping in the header");
    assert_eq!(refused(put(252, 1)), "Keyslot 0 is corrupted (stripes 1 != 4000)");
    assert_eq!(refused(put(252, u32::MAX)), "Keyslot 0 is corrupted (stripes -1 != 4000)");
    assert_eq!(refused(put(300, 0)), "Keyslot 1 is corrupted (stripes 0 != 4000)");
}

#[test]
fn key_slots_that_would_take_hours_to_try_are_refused() {
    let mut bytes = usual().create(b"x").unwrap().header.encode();
    put(212, u32::MAX)(&mut bytes);
    let header = Header::parse(&bytes).unwrap();
    let error = header.check_work().unwrap_err().to_string();
    assert!(error.starts_with("LUKS key slots require 8589"), "{error}");
}

proptest! {
    #[test]
    fn any_bytes_parse_as_a_header_or_are_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..700),
        at in 0_usize..592,
        value in any::<u32>(),
    ) {
        let _ = Header::parse(&bytes);
        let mut near = good();
        let end = (at + 4).min(near.len());
        near[at..end].copy_from_slice(&value.to_be_bytes()[..end - at]);
        if let Ok(header) = Header::parse(&near) {
            for slot in &header.slots {
                prop_assert!(slot.material(header.suite).end <= header.payload_offset());
            }
        }
    }
}

/// A valid header, created once.
fn good() -> Vec<u8> {
    static GOOD: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    GOOD.get_or_init(|| usual().create(b"x").unwrap().header.encode()).clone()
}
