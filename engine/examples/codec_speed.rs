//! Speed of every codec on one core, in GiB of raw bytes a second, and the fraction that is stored.
//!
//! Goal: to see what a change of a codec does to it. No goal: to predict a save, which has several
//! workers and a device. Run it with `cargo run --release -p dtr-engine --example codec_speed`;
//! the data are normal weights with deviation 0.02 from a fixed seed, chunks of 4 MiB, and each
//! figure is the best of several passes over more chunks than the caches hold.
#![expect(clippy::print_stdout, reason = "printing is what this program is for")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use dtr_engine::codec::planes::Kernels;
use dtr_engine::codec::{Codec, CodecError, Decoder, Encoded, Encoder};
use dtr_engine::format::layout::ElementType;
use fastrand::Rng;

const CHUNK_BYTES: usize = 4 << 20;
const CHUNKS: usize = 24;
const PASSES: usize = 7;

fn main() -> Result<(), CodecError> {
    let data = [
        ("bytes, 6 bits", ElementType::Bytes, chunks(|random| vec![random.u8(..) & 0x3f])),
        ("f16 weights", ElementType::F16, chunks(|random| f16(weight(random)).to_vec())),
        ("bf16 weights", ElementType::Bf16, chunks(|random| bf16(weight(random)).to_vec())),
        ("f32 weights", ElementType::F32, chunks(|random| weight(random).to_le_bytes().to_vec())),
        ("f64 weights", ElementType::F64, chunks(|random| weight_f64(random).to_vec())),
        ("f32 zeros", ElementType::F32, chunks(|_| vec![0; 4])),
        ("f32 noise", ElementType::F32, chunks(|random| vec![random.u8(..); 1])),
    ];

    println!("{:<14} {:<6} {:>10} {:>10} {:>8}", "data", "codec", "encode", "decode", "stored");
    for (name, element, chunks) in &data {
        for codec in [Codec::Float, Codec::Zstd, Codec::Gzip] {
            measure_codec(name, codec, *element, chunks)?;
        }
    }

    println!();
    println!("{:<14} {:<6} {:>10} {:>10}", "planes", "width", "split", "join");
    for kernels in Kernels::available() {
        for width in [2, 4, 8] {
            measure_planes(kernels, width, &data[3].2);
        }
    }
    Ok(())
}

fn measure_codec(
    name: &str,
    codec: Codec,
    element: ElementType,
    chunks: &[Vec<u8>],
) -> Result<(), CodecError> {
    // gzip is so slow that a chunk a pass shows enough.
    let (chunks, passes) = if codec == Codec::Gzip { (&chunks[..1], 1) } else { (chunks, PASSES) };
    let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
    let mut stored = vec![vec![0; CHUNK_BYTES]; chunks.len()];
    let mut results = vec![Encoded::Raw; chunks.len()];
    let encode_time = best_of(passes, || {
        for ((raw, stored), result) in chunks.iter().zip(&mut stored).zip(&mut results) {
            *result = encoder.encode(codec, element, raw, stored)?;
        }
        Ok(())
    })?;

    let mut back = vec![0; CHUNK_BYTES];
    let mut stored_bytes = 0;
    let decode_time = best_of(passes, || {
        stored_bytes = 0;
        for (stored, result) in stored.iter().zip(&results) {
            match result {
                Encoded::Raw => stored_bytes += CHUNK_BYTES,
                Encoded::Stored(bytes) => {
                    decoder.decode(codec, &stored[..*bytes], &mut back)?;
                    stored_bytes += bytes;
                }
            }
        }
        Ok(())
    })?;
    assert!(results[chunks.len() - 1] == Encoded::Raw || back == chunks[chunks.len() - 1]);

    let raw_bytes = chunks.len() * CHUNK_BYTES;
    println!(
        "{name:<14} {:<6} {:>10} {:>10} {:>7}%",
        codec.name(),
        gib_per_second(raw_bytes, encode_time),
        if stored_bytes == raw_bytes { "-".into() } else { gib_per_second(raw_bytes, decode_time) },
        stored_bytes * 100 / raw_bytes,
    );
    Ok(())
}

/// Splits and joins blocks of 128 KiB a plane, as the float codec does, between chunks in memory
/// and planes in the cache.
fn measure_planes(kernels: Kernels, width: usize, chunks: &[Vec<u8>]) {
    let mut buffer = vec![0; width << 17];
    let split_time = best_of(PASSES, || {
        for block in chunks.iter().flat_map(|chunk| chunk.chunks_exact(width << 17)) {
            let mut planes: Vec<&mut [u8]> = buffer.chunks_exact_mut(1 << 17).collect();
            kernels.split(black_box(block), &mut planes);
        }
        Ok(())
    });
    let planes: Vec<&[u8]> = buffer.chunks_exact(1 << 17).collect();
    let mut back = chunks.to_vec();
    let join_time = best_of(PASSES, || {
        for block in back.iter_mut().flat_map(|chunk| chunk.chunks_exact_mut(width << 17)) {
            kernels.join(black_box(&planes), block);
        }
        Ok(())
    });
    let speed = |time: Result<Duration, CodecError>| {
        gib_per_second(chunks.len() * CHUNK_BYTES, time.unwrap_or(Duration::MAX))
    };
    println!(
        "{:<14} {width:<6} {:>10} {:>10}",
        kernels.name(),
        speed(split_time),
        speed(join_time)
    );
}

fn best_of(
    passes: usize,
    mut work: impl FnMut() -> Result<(), CodecError>,
) -> Result<Duration, CodecError> {
    let mut best = Duration::MAX;
    for _ in 0..passes {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed());
    }
    Ok(best)
}

fn gib_per_second(bytes: usize, time: Duration) -> String {
    let mib = u32::try_from(bytes >> 20).map_or(f64::INFINITY, f64::from);
    format!("{:.2}", mib / 1024.0 / time.as_secs_f64())
}

/// Chunks of the elements that `element` makes.
fn chunks(mut element: impl FnMut(&mut Rng) -> Vec<u8>) -> Vec<Vec<u8>> {
    let mut random = Rng::with_seed(42);
    let mut chunk = || {
        let mut raw = Vec::with_capacity(CHUNK_BYTES + 8);
        while raw.len() < CHUNK_BYTES {
            raw.extend(element(&mut random));
        }
        raw
    };
    (0..CHUNKS).map(|_| chunk()).collect()
}

/// Normal, deviation 0.02, by Box and Muller; its lowest bits are noise.
fn weight_f64(random: &mut Rng) -> [u8; 8] {
    let (radius, angle) = (1.0 - random.f64(), random.f64());
    let value = 0.02 * (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos();
    value.to_le_bytes()
}

/// [`weight_f64`] rounded towards zero.
fn weight(random: &mut Rng) -> f32 {
    let bits = u64::from_le_bytes(weight_f64(random));
    let (sign, exponent) = ((bits >> 32) & 0x8000_0000, (bits >> 52) & 0x7ff);
    let bits = sign | (exponent.saturating_sub(896) << 23) | ((bits >> 29) & 0x7f_ffff);
    let [a, b, c, d, ..] = bits.to_le_bytes();
    f32::from_le_bytes([a, b, c, d])
}

/// The upper half of a float32.
fn bf16(value: f32) -> [u8; 2] {
    let [_, _, low, high] = value.to_le_bytes();
    [low, high]
}

/// binary16 by truncation; what is too small for it becomes zero.
fn f16(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    let (sign, exponent) = ((bits >> 16) & 0x8000, (bits >> 23) & 0xff);
    let half = match exponent.checked_sub(112) {
        Some(exponent @ 1..=30) => sign | (exponent << 10) | ((bits >> 13) & 0x3ff),
        _ => sign,
    };
    let [low, high, ..] = half.to_le_bytes();
    [low, high]
}
