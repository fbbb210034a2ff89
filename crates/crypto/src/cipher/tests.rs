//! Tests of the sector ciphers: published test vectors, and properties of every suite.

use super::*;
use crate::hash::Hash;

fn suite(cipher: BlockCipher, mode: Mode, iv: IvGenerator) -> Suite {
    Suite { cipher, mode, iv }
}

/// All supported suites.
fn suites() -> Vec<Suite> {
    let mut ivs = vec![IvGenerator::Plain, IvGenerator::Plain64];
    ivs.extend(Hash::ALL.map(IvGenerator::Essiv));
    let mut all = Vec::new();
    for cipher in BlockCipher::ALL {
        for mode in Mode::ALL {
            all.extend(ivs.iter().map(|iv| suite(cipher, mode, *iv)));
        }
    }
    all.retain(|suite| suite.check().is_ok());
    all
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect()
}

fn cipher(suite: Suite) -> SectorCipher {
    SectorCipher::new(suite, &pattern(suite.key_len())).unwrap()
}

#[test]
fn encrypted_data_decrypts_only_with_the_same_sector_number() {
    assert!(suites().len() > 100);
    for suite in suites() {
        let cipher = cipher(suite);
        let plain = pattern(SECTOR * 11);
        let mut data = plain.clone();
        cipher.apply(Direction::Encrypt, 77, &mut data).unwrap();
        assert!(data != plain, "{suite:?}");
        cipher.apply(Direction::Decrypt, 77, &mut data).unwrap();
        assert!(data == plain, "{suite:?}");
        cipher.apply(Direction::Encrypt, 77, &mut data).unwrap();
        cipher.apply(Direction::Decrypt, 78, &mut data).unwrap();
        assert_eq!(data == plain, suite.mode == Mode::Ecb, "{suite:?}");
    }
}

#[test]
fn sectors_encrypt_to_the_same_bytes_one_by_one_and_together() {
    for suite in suites() {
        let cipher = cipher(suite);
        let mut together = pattern(SECTOR * 19);
        let mut apart = together.clone();
        cipher.apply(Direction::Encrypt, 5, &mut together).unwrap();
        for (sector, number) in apart.chunks_exact_mut(SECTOR).zip(5..) {
            cipher.apply(Direction::Encrypt, number, sector).unwrap();
        }
        assert!(together == apart, "{suite:?}");
    }
}

#[test]
fn an_incomplete_sector_is_refused_and_stays_unchanged() {
    for suite in suites() {
        let cipher = cipher(suite);
        for len in [1, SECTOR - 1, SECTOR + 16, SECTOR * 9 - 1] {
            for direction in [Direction::Encrypt, Direction::Decrypt] {
                let mut data = pattern(len);
                cipher.apply(direction, 0, &mut data).unwrap_err();
                assert!(data == pattern(len), "{suite:?}");
            }
        }
        cipher.apply(Direction::Encrypt, 0, &mut []).unwrap();
    }
}

#[test]
fn xts_produces_the_test_vector_of_ieee_1619() {
    // Vector 4: AES-128, sector 0, data 00 01 02 … 512 bytes.
    let key: Vec<u8> =
        [0x2718_2818_2845_9045_2353_6028_7471_3526_u128, 0x3141_5926_5358_9793_2384_6264_3383_2795]
            .iter()
            .flat_map(|half| half.to_be_bytes())
            .collect();
    let suite = suite(BlockCipher::Aes128, Mode::Xts, IvGenerator::Plain64);
    let mut data: Vec<u8> = (0..=255).chain(0..=255).collect();
    SectorCipher::new(suite, &key).unwrap().apply(Direction::Encrypt, 0, &mut data).unwrap();
    let start = u128::from_be_bytes(*data.first_chunk().unwrap());
    assert_eq!(start, 0x27a7_479b_efa1_d476_489f_308c_d4cf_a6e2);
}

#[test]
fn cipher_parts_that_cannot_be_combined_are_refused() {
    let refused = |cipher, mode, iv| suite(cipher, mode, iv).check().unwrap_err().to_string();
    let essiv = |hash| IvGenerator::Essiv(hash);
    assert_eq!(
        refused(BlockCipher::Cast5, Mode::Xts, IvGenerator::Plain),
        "Unsupported cipher mode xts"
    );
    assert_eq!(
        refused(BlockCipher::Aes128, Mode::Cbc, essiv(Hash::Sha1)),
        "No AES cipher with key size 20 available"
    );
    assert_eq!(
        refused(BlockCipher::Cast5, Mode::Cbc, essiv(Hash::Sha256)),
        "Cipher cast5-128 not supported with essiv"
    );
    let aes = suite(BlockCipher::Aes256, Mode::Xts, IvGenerator::Plain64);
    assert!(SectorCipher::new(aes, &[0; 32]).is_err());
}
