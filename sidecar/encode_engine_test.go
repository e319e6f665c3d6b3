// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"testing"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/simulate"
)

// TestEncodeWithEngines runs each encoder connector against simulated engines: media is encoded once, by the encoders
// only, and fetched by whoever uses it.
func TestEncodeWithEngines(t *testing.T) {
	f := func(connector, embeds string, prefills bool) {
		t.Helper()
		name, peers := connector+" "+embeds, simulate.NewRegistry()
		r := newRig(t, func(c *config.Disaggregation) { c.ECConnector, c.Encode.Embeds = connector, embeds })
		with := func(o *simulate.Options) { o.Encoder = connector }
		e0, first := r.engine("e0", "encode", peers, with)
		e1, second := r.engine("e1", "encode", peers, with)
		d, decoder := r.engine("d", "decode", peers, with)
		consumer, prefillers := d, []*pool.Endpoint(nil)
		if prefills {
			p, prefiller := r.engine("p", "prefill", peers, with)
			consumer, prefillers = p, list(prefiller)
		}
		j := (&encodeRig{rig: r}).encodeJob(images("a", "b", "c", "b"), decoder, list(first, second), prefillers)
		out := r.run(j)
		if err := r.Forward(t.Context(), j, out, decoder); err != nil {
			t.Fatal(err)
		}
		if status, _ := decode(t, decoder, j); status != 200 {
			t.Errorf("%s: decode answers %d", name, status)
		}
		if n := e0.Stats().Encoded + e1.Stats().Encoded; n != 3 {
			t.Errorf("%s: %d items encoded, want 3", name, n)
		}
		if s := consumer.Stats(); s.FetchedEncodings != 3 || s.EncodedLocally != 0 || s.FailedEncodings != 0 {
			t.Errorf("%s: the consumer fetched %d, encoded %d, failed %d", name, s.FetchedEncodings, s.EncodedLocally, s.FailedEncodings)
		}
		if s := d.Stats(); s.EncodedLocally != 0 || prefills && (s.Pulls != 1 || s.FailedPulls != 0 || s.FetchedEncodings != 0) || s.Deaths != 0 {
			t.Errorf("%s: decode %+v", name, s)
		}
		if want := (map[bool]string{true: outcomeDisaggregated, false: outcomeAggregated})[prefills]; out.Name != want {
			t.Errorf("%s: %s, want %s", name, out.Name, want)
		}
	}
	for _, connector := range []string{"ec-example", "ec-nixl"} {
		for _, embeds := range []string{"safe", "lean"} {
			f(connector, embeds, true)
			f(connector, embeds, false)
		}
	}
}
