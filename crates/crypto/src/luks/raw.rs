//! The fields of the LUKS header in their on-disk format (section 2.1 of the LUKS specification): big-endian,
//! unaligned, not validated.

use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(super) const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// State of a slot that contains a key.
pub(super) const ACTIVE: u32 = 0x00ac_71f3;
/// State of a slot without a key.
pub(super) const INACTIVE: u32 = 0x0000_dead;

/// A key slot.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawSlot {
    /// [`ACTIVE`] or [`INACTIVE`].
    pub(super) state: U32,
    /// PBKDF2 iterations of the password.
    pub(super) iterations: U32,
    /// PBKDF2 salt of the password.
    pub(super) salt: [u8; 32],
    /// Sector at which the key material begins.
    pub(super) material: U32,
    /// Anti-forensic stripes.
    pub(super) stripes: U32,
}

/// The header.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    /// [`MAGIC`].
    pub(super) magic: [u8; 6],
    /// Version number: 1.
    pub(super) version: U16,
    /// Block cipher, without its key length.
    pub(super) cipher_name: [u8; 32],
    /// Mode and IV generator, `xts-plain64` or `cbc-essiv:sha256`.
    pub(super) cipher_mode: [u8; 32],
    /// Hash of PBKDF2 and the splitter.
    pub(super) hash_spec: [u8; 32],
    /// Sector at which the encrypted data begins.
    pub(super) payload: U32,
    /// Bytes of the master key.
    pub(super) key_bytes: U32,
    /// Digest (PBKDF2) of the master key.
    pub(super) digest: [u8; 20],
    /// Salt of the digest.
    pub(super) digest_salt: [u8; 32],
    /// PBKDF2 iterations of the digest.
    pub(super) digest_iterations: U32,
    /// UUID as text.
    pub(super) uuid: [u8; 40],
    /// The key slots.
    pub(super) slots: [RawSlot; 8],
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<RawSlot>() == 48);
    assert!(offset_of!(RawSlot, salt) == 8);
    assert!(offset_of!(RawSlot, material) == 40);
    assert!(offset_of!(RawSlot, stripes) == 44);
    assert!(size_of::<RawHeader>() == 592);
    assert!(offset_of!(RawHeader, version) == 6);
    assert!(offset_of!(RawHeader, cipher_name) == 8);
    assert!(offset_of!(RawHeader, cipher_mode) == 40);
    assert!(offset_of!(RawHeader, hash_spec) == 72);
    assert!(offset_of!(RawHeader, payload) == 104);
    assert!(offset_of!(RawHeader, key_bytes) == 108);
    assert!(offset_of!(RawHeader, digest) == 112);
    assert!(offset_of!(RawHeader, digest_salt) == 132);
    assert!(offset_of!(RawHeader, digest_iterations) == 164);
    assert!(offset_of!(RawHeader, uuid) == 168);
    assert!(offset_of!(RawHeader, slots) == 208);
};
