// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"strings"
	"sync"
)

// The fake tokenizer: a token is four bytes of text, so a text of b bytes has ⌈b/4⌉ tokens. What the engine generates
// are four-byte words (" bab" …), so an answer that comes back in the next turn of a chat is tokenized to the ids that
// were generated, and its KV blocks are found again. Words in capitals are what an engine says on wrong KV.
const (
	pieceBytes = 4
	consonants = "bdfghjklmnprstvz"
	vowels     = "aeiou"
	wordCount  = len(consonants) * len(vowels) * len(consonants)
	wordBase   = 768                    // ids of words
	wrongBase  = wordBase + wordCount   // ids of the words in capitals
	pieceBase  = wrongBase + wordCount  // ids of every other piece, by hash
	vocabulary = 128_000                // ids are below it
	pieceRange = vocabulary - pieceBase // number of hashed ids
)

// words is the text of all words, four bytes each: those in small letters, then those in capitals.
var words = sync.OnceValue(func() string {
	var b strings.Builder
	for _, c := range consonants {
		for _, v := range vowels {
			for _, d := range consonants {
				b.WriteString(" " + string([]rune{c, v, d}))
			}
		}
	}
	return b.String() + strings.ToUpper(b.String())
})

// tokenize appends the tokens of text to dst.
func tokenize(dst []uint32, text string) []uint32 {
	for i := 0; i < len(text); i += pieceBytes {
		dst = append(dst, pieceID(text[i:min(i+pieceBytes, len(text))]))
	}
	return dst
}

func pieceID(piece string) uint32 {
	if len(piece) == pieceBytes && piece[0] == ' ' {
		if id, ok := wordID(piece, 0); ok {
			return uint32(wordBase) + id
		}
		if id, ok := wordID(piece, 'a'-'A'); ok {
			return uint32(wrongBase) + id
		}
	}
	return uint32(pieceBase) + uint32(hashText(piece)%uint64(pieceRange))
}

// wordID returns the number of the word in piece; shift is added to its letters first.
func wordID(piece string, shift byte) (uint32, bool) {
	a := strings.IndexByte(consonants, piece[1]+shift)
	v := strings.IndexByte(vowels, piece[2]+shift)
	b := strings.IndexByte(consonants, piece[3]+shift)
	if a < 0 || v < 0 || b < 0 {
		return 0, false
	}
	return uint32((a*len(vowels)+v)*len(consonants) + b), true //nolint:gosec // below wordCount
}

// tokenText is the text of a token: its own for words, some word for the ids of hashed pieces.
func tokenText(id uint32) string {
	n := int(id) - wordBase
	if n < 0 || n >= 2*wordCount {
		n = int(id) % wordCount
	}
	return words()[n*pieceBytes : (n+1)*pieceBytes]
}

// nextToken is the i-th token generated from seed; wrong says that the KV is not the prompt's.
func nextToken(seed uint64, i int, wrong bool) uint32 {
	n := uint32(mix(seed+uint64(i)*0x9e3779b97f4a7c15) % uint64(wordCount)) //nolint:gosec // below wordCount
	if wrong {
		return uint32(wrongBase) + n
	}
	return uint32(wordBase) + n
}

// mix is the finalizer of splitmix64.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

const hashOffset, hashPrime = 14695981039346656037, 1099511628211

// hashText is FNV-1a with a finalizer.
func hashText(s string) uint64 {
	h := uint64(hashOffset)
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * hashPrime
	}
	return mix(h)
}

// chainHash extends the hash of a prefix by tokens.
func chainHash(parent uint64, tokens []uint32) uint64 {
	h := parent ^ hashOffset
	for _, t := range tokens {
		h = (h ^ uint64(t)) * hashPrime
		h ^= h >> 32
	}
	return mix(h)
}

// chain returns the hash of each full block's prefix.
func chain(root uint64, tokens []uint32, blockSize int) []uint64 {
	out := make([]uint64, 0, len(tokens)/blockSize+1)
	for i := 0; i+blockSize <= len(tokens); i += blockSize {
		root = chainHash(root, tokens[i:i+blockSize])
		out = append(out, root)
	}
	return out
}
