// SPDX-License-Identifier: Apache-2.0

package prefix

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/alloctest"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
)

// request is a prompt of text, in chunks of at most n bytes (0 = one chunk), with a JSON frame around it.
func request(text string, n int) *inference.Request {
	const frame = `{"prompt":"`
	r := &inference.Request{
		Model: "m", Text: []inference.Span{{Start: len(frame), End: len(frame) + len(text)}}, TextBytes: len(text),
	}
	body := []byte(frame + text + `"}`)
	if n == 0 {
		n = len(body)
	}
	for chunk := range slices.Chunk(body, n) {
		r.Body.Append(chunk)
	}
	return r
}

func hash(x *Index, r *inference.Request) *Keys {
	k := &Keys{}
	x.Hash(r, k)
	return k
}

func state(slot uint32) *pool.State { return pooltest.E(fmt.Sprintf("p%d", slot)).Build(slot).State }

func match(x *Index, k *Keys, slot uint32) int32 {
	var m Matches
	x.Lookup(k, &m)
	return m.Of(slot)
}

func TestHashIgnoresChunks(t *testing.T) {
	x := New(Options{})
	text := strings.Repeat("0123456789abcdef", 100)
	want := hash(x, request(text, 0))
	if len(want.Hashes) != 7 { // 1,600 bytes, 256 to a block
		t.Fatalf("%d blocks, want 7", len(want.Hashes))
	}
	for _, n := range []int{1, 2, 7, 255, 256, 257, 1000} {
		if diff := cmp.Diff(want, hash(x, request(text, n))); diff != "" {
			t.Errorf("chunks of %d bytes: %s", n, diff)
		}
	}
	// The same text in several spans hashes the same: blocks do not end with a span.
	split := request(text, 0)
	s := split.Text[0]
	split.Text = []inference.Span{{Start: s.Start, End: s.Start + 100}, {Start: s.Start + 100, End: s.Start + 101}, {Start: s.Start + 101, End: s.End}}
	if diff := cmp.Diff(want, hash(x, split)); diff != "" {
		t.Errorf("several spans: %s", diff)
	}
}

func TestHashDependsOn(t *testing.T) {
	x := New(Options{})
	text := strings.Repeat("0123456789abcdef", 100)
	base := hash(x, request(text, 0)).Hashes
	f := func(name string, wantShared int, change func(r *inference.Request)) {
		t.Helper()
		r := request(text, 0)
		change(r)
		got := hash(x, r).Hashes
		shared := 0
		for shared < min(len(got), len(base)) && got[shared] == base[shared] {
			shared++
		}
		if shared != wantShared {
			t.Errorf("%s: %d blocks shared, want %d", name, shared, wantShared)
		}
	}
	f("nothing", 7, func(*inference.Request) {})
	f("model", 0, func(r *inference.Request) { r.Model = "other" })
	f("cache salt", 0, func(r *inference.Request) { r.CacheSalt = "s" })
	f("first byte", 0, func(r *inference.Request) { r.Text[0].Start++ })
	f("a byte in the fourth block", 3, func(r *inference.Request) { r.Body.Chunks[0][r.Text[0].Start+3*256+10] = 'X' })
	f("tail cut off", 6, func(r *inference.Request) { r.Text[0].End -= 10 })
	f("media behind the text", 6, func(r *inference.Request) {
		r.Media = []inference.Media{{Kind: "image_url", Span: inference.Span{Start: r.Text[0].End, End: r.Text[0].End + 2}}}
	})
	f("media before the text", 0, func(r *inference.Request) {
		r.Media = []inference.Media{{Kind: "image_url", Span: inference.Span{Start: 0, End: 5}}}
	})
}

func TestHashMediaCountsTokens(t *testing.T) {
	x := New(Options{})
	r := request("what is this?", 0)
	r.Media = []inference.Media{{Kind: "image_url", Span: inference.Span{Start: 0, End: 5}}}
	k := hash(x, r)
	if want := imageTokens + 4; k.Tokens != want {
		t.Errorf("%d tokens, want %d", k.Tokens, want)
	}
	if want := 4; len(k.Hashes) != want { // 225 + 4 tokens, 64 to a block
		t.Errorf("%d blocks, want %d", len(k.Hashes), want)
	}
}

func TestHashTokenIDs(t *testing.T) {
	x := New(Options{})
	var b strings.Builder
	b.WriteString("[")
	for i := range 130 {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprint(&b, 1000+i)
	}
	b.WriteString("]")
	ids := func(chunk int) *inference.Request {
		r := request(b.String(), chunk)
		r.TokenIDs = 130
		return r
	}
	want := hash(x, ids(0))
	if len(want.Hashes) != 3 || want.Tokens != 130 {
		t.Fatalf("%d blocks, %d tokens, want 3 and 130", len(want.Hashes), want.Tokens)
	}
	for _, n := range []int{1, 3, 64} {
		if diff := cmp.Diff(want, hash(x, ids(n))); diff != "" {
			t.Errorf("chunks of %d bytes: %s", n, diff)
		}
	}
	// Spaces between the numbers do not matter.
	dense := request(strings.ReplaceAll(b.String(), " ", ""), 0)
	dense.TokenIDs = 130
	if diff := cmp.Diff(want, hash(x, dense)); diff != "" {
		t.Errorf("without spaces: %s", diff)
	}
}

func TestHashLimits(t *testing.T) {
	x := New(Options{MaxTokens: 200})
	if n := len(hash(x, request(strings.Repeat("a", 10000), 0)).Hashes); n != 3 {
		t.Errorf("%d blocks of a long prompt, want 3", n)
	}
	if n := len(hash(x, request("", 0)).Hashes); n != 0 {
		t.Errorf("%d blocks of no prompt, want 0", n)
	}
	r := request("abc", 0)
	r.Text[0].End += 1000 // a span past the body's end must not panic
	hash(x, r)
}

func TestForget(t *testing.T) {
	x := New(Options{})
	k := hash(x, request(strings.Repeat("a", 1000), 0))
	old := state(3)
	x.Learn(old, k)
	if got := match(x, k, 3); got != 4 {
		t.Fatalf("matched %d, want 4", got)
	}
	x.Forget(3)
	x.Forget(99) // never seen
	if got := match(x, k, 3); got != 0 {
		t.Errorf("matched %d after Forget", got)
	}
	x.Learn(old, k) // the answer to a request sent before the endpoint went
	if got := match(x, k, 3); got != 0 {
		t.Errorf("matched %d: the gone endpoint came back", got)
	}
	if x.Blocks() != 0 || x.Bytes() != 0 {
		t.Errorf("%d blocks, %d bytes left", x.Blocks(), x.Bytes())
	}
	next := state(3)
	x.Learn(next, k)
	if got := match(x, k, 3); got != 4 {
		t.Errorf("the slot's next endpoint: matched %d, want 4", got)
	}
}

func TestCapacityFromMetrics(t *testing.T) {
	f := func(autoTune bool, want int64) {
		t.Helper()
		x := New(Options{Capacity: 10, AutoTune: autoTune})
		e := pooltest.E("p").Cache(16, 100).Build(0) // 1,600 tokens
		for i := range 100 {
			x.Learn(e.State, hash(x, request(fmt.Sprintf("%0500d", i), 0)))
		}
		if got := x.Blocks(); got != want {
			t.Errorf("autoTune %v: %d blocks, want %d", autoTune, got, want)
		}
	}
	f(false, 10)
	f(true, 25)
}

// oracle is the index as one would write it without a thought for speed: per endpoint, pieces in order of use.
type oracle struct {
	capacity int64
	slots    map[uint32][]uint64 // newest first
}

func (o *oracle) fit(list []uint64) []uint64 {
	size := int64(0)
	for i, k := range list {
		if size += weight(k); size > o.capacity {
			return list[:i]
		}
	}
	return list
}

func (o *oracle) learn(slot uint32, chain []uint64) {
	chain = o.fit(chain)
	list := slices.DeleteFunc(o.slots[slot], func(k uint64) bool { return slices.Contains(chain, k) })
	o.slots[slot] = o.fit(append(slices.Clone(chain), list...))
}

func (o *oracle) match(slot uint32, k *Keys) int32 {
	n := 0
	for n < len(k.Hashes) && slices.Contains(o.slots[slot], k.Hashes[n]) {
		n++
	}
	return int32(min(blocksIn(n), k.Blocks))
}

// TestAgainstOracle: random prompts that share prefixes, on random endpoints, with evictions and departures.
func TestAgainstOracle(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	const slots = 130 // more than two words of a bitmap
	const capacity = 1500
	x := New(Options{Capacity: capacity})
	o := &oracle{capacity: capacity, slots: map[uint32][]uint64{}}
	states := make([]*pool.State, slots)
	for i := range states {
		states[i] = state(uint32(i))
	}
	random := func() *Keys {
		var b strings.Builder
		fmt.Fprintf(&b, "%0256d", rng.IntN(3)) // few first blocks: many endpoints share them
		for range rng.IntN(12) {
			fmt.Fprintf(&b, "%0*d", 1+rng.IntN(4)*5000, rng.IntN(3))
		}
		return hash(x, request(b.String(), 0))
	}
	var m Matches
	for step := range 1500 {
		k, slot := random(), uint32(rng.IntN(slots))
		switch {
		case step%100 == 99:
			x.Forget(slot)
			delete(o.slots, slot)
			states[slot] = state(slot)
		case step%2 == 0:
			x.Learn(states[slot], k)
			o.learn(slot, k.Hashes)
		default:
			x.Lookup(k, &m)
			for s := range uint32(slots) {
				if got, want := m.Of(s), o.match(s, k); got != want {
					t.Fatalf("step %d slot %d: matched %d of %d, want %d", step, s, got, k.Blocks, want)
				}
			}
		}
	}
	total := int64(0)
	for _, list := range o.slots {
		for _, k := range list {
			total += weight(k)
		}
	}
	if x.Blocks() != total {
		t.Errorf("%d blocks, want %d", x.Blocks(), total)
	}
}

// TestMemoryBound: the index keeps to MaxBytes by its own account, and the account is true within a third.
func TestMemoryBound(t *testing.T) {
	const limit = 8 << 20
	heap := func() int64 {
		var ms runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&ms)
		return int64(ms.HeapAlloc)
	}
	before := heap()
	x := New(Options{MaxBytes: limit, Capacity: 1 << 20})
	k := &Keys{Hashes: make([]uint64, 100)}
	rng := rand.New(rand.NewPCG(3, 4))
	states := make([]*pool.State, 20)
	for i := range states {
		states[i] = state(uint32(i))
	}
	for i := range 2500 {
		for j := range k.Hashes {
			k.Hashes[j] = rng.Uint64() &^ classMask
		}
		x.Learn(states[i%len(states)], k)
		if got := x.Bytes(); got > limit {
			t.Fatalf("%d bytes, limit %d", got, limit)
		}
	}
	used := heap() - before
	t.Logf("%d blocks, accounted %d KiB, measured %d KiB", x.Blocks(), x.Bytes()>>10, used>>10)
	if used > limit*4/3 {
		t.Errorf("heap grew by %d bytes, limit %d", used, limit)
	}
	for _, st := range states {
		x.Forget(st.Slot)
	}
	if x.Bytes() != 0 || x.Blocks() != 0 {
		t.Errorf("%d bytes, %d blocks after all endpoints went", x.Bytes(), x.Blocks())
	}
}

// TestPieces: every block belongs to exactly one piece, and prompts of all lengths match themselves to the last block.
func TestPieces(t *testing.T) {
	for n := range 3000 {
		pieces := piecesIn(n)
		if low, high := blocksIn(pieces), blocksIn(pieces+1); n < low || n >= high {
			t.Fatalf("%d blocks: %d pieces cover %d, one more %d", n, pieces, low, high)
		}
		if w, want := weight(class(n)<<classShift), int64(blocksIn(n+1)-blocksIn(n)); w != want {
			t.Fatalf("piece %d weighs %d, want %d", n, w, want)
		}
	}
	for _, n := range []int{1, 255, 256, 257, 64 * 256, 64*256 + 1, 100 * 256, 512 * 256, 515*256 + 7, 100_000, 131072 * 4} {
		x := New(Options{})
		k := hash(x, request(strings.Repeat("x", n), 0))
		if want := (n + 255) / 256; k.Blocks != want {
			t.Errorf("%d bytes: %d blocks, want %d", n, k.Blocks, want)
		}
		x.Learn(state(0), k)
		if got := match(x, k, 0); int(got) != k.Blocks {
			t.Errorf("%d bytes: matched %d of %d blocks", n, got, k.Blocks)
		}
	}
}

func TestSetLimits(t *testing.T) {
	x := New(Options{Capacity: 10})
	if x.SetLimits(Options{BlockTokens: 128}) {
		t.Error("another block size was accepted")
	}
	if !x.SetLimits(Options{Capacity: 2}) {
		t.Fatal("the same block size was refused")
	}
	st := state(0)
	x.Learn(st, hash(x, request(strings.Repeat("a", 2000), 0)))
	if got := x.Blocks(); got != 2 {
		t.Errorf("%d blocks, want 2", got)
	}
}

// TestConcurrent is for the race detector.
func TestConcurrent(t *testing.T) {
	x := New(Options{Capacity: 50, MaxBytes: 1 << 16})
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 0))
			var m Matches
			k := &Keys{}
			for range 500 {
				x.Hash(request(strings.Repeat(strconv.Itoa(rng.IntN(5)), 256*(1+rng.IntN(40))), 0), k)
				st := state(uint32(rng.IntN(10)))
				x.Lookup(k, &m)
				x.Learn(st, k)
				if rng.IntN(20) == 0 {
					x.Forget(st.Slot)
				}
				x.SetLimits(Options{Capacity: 50, MaxBytes: 1 << 16})
			}
		})
	}
	wg.Wait()
}

func TestAllocations(t *testing.T) {
	x := New(Options{})
	r := request(strings.Repeat("0123456789abcdef", 4000), 16<<10)
	k, m := &Keys{}, &Matches{}
	x.Learn(state(500), hash(x, r))
	alloctest.AtMost(t, 0, "hash and look-up", func() { x.Hash(r, k); x.Lookup(k, m) })
	st := state(7)
	x.Learn(st, k)
	alloctest.AtMost(t, 0, "learn of a known prompt", func() { x.Learn(st, k) })
}

func BenchmarkHash(b *testing.B) {
	for _, size := range []int{4 << 10, 400 << 10} {
		b.Run(fmt.Sprintf("bytes=%d", size), func(b *testing.B) {
			x := New(Options{})
			r := request(strings.Repeat("0123456789abcdef", size/16), 16<<10)
			k := &Keys{}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				x.Hash(r, k)
			}
		})
	}
}

func BenchmarkLookup(b *testing.B) {
	for _, endpoints := range []int{10, 1000} {
		for _, blocks := range []int{16, 1600} {
			b.Run(fmt.Sprintf("endpoints=%d/blocks=%d", endpoints, blocks), func(b *testing.B) {
				x := New(Options{MaxBytes: 1 << 30})
				r := request(strings.Repeat("0123456789abcdef", 16*blocks), 0)
				k, m := hash(x, r), &Matches{}
				for i := range endpoints { // everybody has a part
					part := &Keys{Hashes: k.Hashes[:1+i*(len(k.Hashes)-1)/endpoints]}
					x.Learn(state(uint32(i)), part)
				}
				b.ReportAllocs()
				for b.Loop() {
					x.Lookup(k, m)
				}
			})
		}
	}
}

func BenchmarkLearn(b *testing.B) {
	for _, size := range []int{4 << 10, 400 << 10} {
		b.Run(fmt.Sprintf("new bytes=%d", size), func(b *testing.B) {
			x := New(Options{})
			text := []byte(strings.Repeat("0123456789abcdef", size/16))
			r := request(string(text), 0)
			k := &Keys{}
			st := state(0)
			n := 0
			b.ReportAllocs()
			for b.Loop() {
				n++
				copy(r.Body.Chunks[0][r.Text[0].Start:], fmt.Sprintf("%016d", n))
				x.Hash(r, k)
				x.Learn(st, k)
			}
		})
	}
}

func BenchmarkParallelLookup(b *testing.B) {
	x := New(Options{})
	r := request(strings.Repeat("0123456789abcdef", 1600), 0)
	k := hash(x, r)
	for i := range 10 {
		x.Learn(state(uint32(i)), k)
	}
	b.RunParallel(func(pb *testing.PB) {
		m := &Matches{}
		for pb.Next() {
			x.Lookup(k, m)
		}
	})
}
