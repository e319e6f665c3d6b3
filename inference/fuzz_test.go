// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const apis = int(SGLangGenerate) + 1

// split cuts body into chunks of the sizes that sizes gives, over and over; 0 makes an empty chunk.
func split(body, sizes []byte) Body {
	var b Body
	for i := 0; len(body) > 0; i++ {
		n := len(body)
		if len(sizes) > 0 && !bytes.Equal(sizes, make([]byte, len(sizes))) {
			n = min(n, int(sizes[i%len(sizes)]))
		}
		b.Chunks = append(b.Chunks, body[:n:n])
		b.Len += n
		body = body[n:]
	}
	return b
}

func found(r *Request) expected {
	return expected{
		Model: r.Model, CacheSalt: r.CacheSalt, HasModel: r.HasModel, Stream: r.Stream, MaxTokens: r.MaxTokens, N: r.N,
		Prompts: r.Prompts, Text: r.Text, TokenIDs: r.TokenIDs, Media: r.Media, Bars: r.Bars, Transfer: r.HasTransferFields,
	}
}

// check compares Parse with the oracle, whole and split.
func check(t *testing.T, api API, body, sizes []byte) {
	t.Helper()
	whole, err := Parse(api, split(body, nil))
	parted, partedErr := Parse(api, split(body, sizes))
	if (err == nil) != (partedErr == nil) || err != nil && err.Error() != partedErr.Error() {
		t.Fatalf("%q: whole: %v, split: %v", body, err, partedErr)
	}
	root := oracle(body)
	if err != nil {
		if !errors.Is(err, ErrMalformed) {
			t.Fatalf("%q: %v", body, err)
		}
		if root != nil && root.depth() <= maxDepth && (api == Unknown || root.kind == '{' && !expect(api, root).Refused) {
			t.Fatalf("%q: refused, though right: %v", body, err)
		}
		return
	}
	if len(body) == 0 && api == Unknown {
		return
	}
	if root == nil {
		t.Fatalf("%q: accepted, though wrong", body)
	}
	want := expect(api, root)
	if want.Refused {
		t.Fatalf("%q: accepted, though a field has a wrong type", body)
	}
	for _, r := range []*Request{whole, parted} {
		if r.Body.Len != len(body) {
			t.Fatalf("%q: length %d", body, r.Body.Len)
		}
		if diff := cmp.Diff(want, found(r), equateEmpty); diff != "" {
			t.Fatalf("api %d, %q: (-encoding/json +Parse)\n%s", api, body, diff)
		}
	}
	checkFields(t, body)
}

var equateEmpty = cmp.FilterValues(func(a, b any) bool { return isEmpty(a) && isEmpty(b) }, cmp.Comparer(func(any, any) bool { return true }))

func isEmpty(v any) bool {
	switch v := v.(type) {
	case []Span:
		return len(v) == 0
	case []Media:
		return len(v) == 0
	}
	return false
}

// checkFields compares Field with a map of raw messages.
func checkFields(t *testing.T, body []byte) {
	t.Helper()
	var want map[string]json.RawMessage
	if json.Unmarshal(body, &want) != nil || want == nil {
		return
	}
	for key, value := range want {
		raw, ok, err := Field(body, key)
		if len(key) < maxKey/6 && (!ok || err != nil || !bytes.Equal(raw, value)) {
			t.Fatalf("%q: field %q: %q, %v, %v, want %q", body, key, raw, ok, err, value)
		}
	}
}

func addSeeds(f *testing.F, add func(api API, body []byte)) {
	f.Helper()
	for _, s := range seeds(f) {
		add(s.api, s.body)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		add(API(r.IntN(apis)), randomRequest(r))
	}
}

// FuzzParse holds Parse against encoding/json, and against itself on other chunks.
func FuzzParse(f *testing.F) {
	addSeeds(f, func(api API, body []byte) { f.Add(byte(api), body, []byte{3, 0, 1}) })
	f.Fuzz(func(t *testing.T, api byte, body, sizes []byte) { check(t, API(int(api)%apis), body, sizes) })
}

// TestParseRandom does the same with requests that are JSON more often than a fuzzer's.
func TestParseRandom(t *testing.T) {
	for i := range 5_000 {
		r := rand.New(rand.NewPCG(uint64(i), 7))
		check(t, API(r.IntN(apis)), randomRequest(r), []byte{byte(r.IntN(9)), byte(1 + r.IntN(5))})
	}
}
