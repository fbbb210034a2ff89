//! Measures how fast one core encrypts and decrypts sectors: `cargo run --release -p oxblk-crypto --example
//! throughput`.

use std::time::{Duration, Instant};

use oxblk_crypto::Result;
use oxblk_crypto::cipher::{BlockCipher, Direction, IvGenerator, Mode, SectorCipher, Suite};

/// Bytes per call: the part of a request that one worker processes.
const PIECE: usize = 128 << 10;

fn measure(cipher: &SectorCipher, direction: Direction, data: &mut [u8]) -> Result<f64> {
    let (start, mut rounds) = (Instant::now(), 0_u32);
    while start.elapsed() < Duration::from_millis(200) {
        cipher.apply(direction, u64::from(rounds), data)?;
        rounds += 1;
    }
    let mebibytes =
        f64::from(rounds) * f64::from(u32::try_from(data.len() >> 10).unwrap_or(0)) / 1024.0;
    Ok(mebibytes / start.elapsed().as_secs_f64())
}

fn main() -> Result<()> {
    println!("{:<14} {:>12} {:>12}", "MiB/s", "encrypt", "decrypt");
    let mut data = vec![0; PIECE];
    for cipher in BlockCipher::ALL {
        for mode in Mode::ALL {
            let suite = Suite { cipher, mode, iv: IvGenerator::Plain64 };
            let Ok(ready) = SectorCipher::new(suite, &vec![7; suite.key_len()]) else { continue };
            let encrypt = measure(&ready, Direction::Encrypt, &mut data)?;
            let decrypt = measure(&ready, Direction::Decrypt, &mut data)?;
            println!("{:<11}{:<4}{encrypt:>11.0} {decrypt:>12.0}", cipher.name(), mode.name());
        }
    }
    Ok(())
}
