// SPDX-License-Identifier: Apache-2.0

package scheduler_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/scheduler"
)

// pdSample is a P/D file in the shape of llm-d's samples.
const pdSample = `
plugins:
- {type: disagg-profile-handler, parameters: {deciders: {prefill: long-prompts}}}
- {name: long-prompts, type: prefix-based-pd-decider, parameters: {nonCachedTokens: 512}}
- {type: approx-prefix-cache-producer, parameters: {maxPrefixTokensToMatch: 32768}}
- {type: prefill-filter}
- {type: decode-filter}
- {type: prefix-cache-scorer}
- {type: token-load-scorer}
- {type: active-request-scorer}
- {type: kv-cache-utilization-scorer}
- {type: max-score-picker}
schedulingProfiles:
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: prefix-cache-scorer, weight: 3}, {pluginRef: token-load-scorer, weight: 2}, {pluginRef: max-score-picker}]
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: active-request-scorer, weight: 2}, {pluginRef: kv-cache-utilization-scorer}, {pluginRef: max-score-picker}]
`

// twoProfiles is a P/D file around a profile handler with other parameters.
func twoProfiles(handler string) string {
	return `
plugins:
- ` + handler + `
- {type: always-disagg-pd-decider}
- {type: always-disagg-multimodal-decider}
- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 16}}
- {type: prefill-filter}
- {type: decode-filter}
- {type: encode-filter}
- {type: queue-scorer}
schedulingProfiles:
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: queue-scorer}]
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: queue-scorer}]
- name: encode
  plugins: [{pluginRef: encode-filter}]
`
}

func TestLoads(t *testing.T) {
	f := func(name, text string, wantDisaggregates bool) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			if s := load(t, text); s.Disaggregates() != wantDisaggregates {
				t.Errorf("disaggregates %v, want %v", s.Disaggregates(), wantDisaggregates)
			}
		})
	}
	f("no configuration", "", false)
	f("no profiles", fourScorers, false)
	f("P/D in llm-d's shape", pdSample, true)
	f("llm-d's own P/D sample", `
plugins:
- type: prefill-filter
- type: decode-filter
- type: approx-prefix-cache-producer
  parameters: {maxPrefixTokensToMatch: 16384, lruCapacityPerServer: 31250}
- type: prefix-cache-scorer
- type: queue-scorer
- type: max-score-picker
- type: prefix-based-pd-decider
  parameters: {nonCachedTokens: 16}
- type: disagg-profile-handler
  parameters: {deciders: {prefill: prefix-based-pd-decider}}
schedulingProfiles:
- name: prefill
  plugins:
  - pluginRef: prefill-filter
  - pluginRef: max-score-picker
  - pluginRef: prefix-cache-scorer
    weight: 2
  - pluginRef: queue-scorer
    weight: 1
- name: decode
  plugins:
  - pluginRef: decode-filter
  - pluginRef: max-score-picker
  - pluginRef: prefix-cache-scorer
    weight: 2
  - pluginRef: queue-scorer
    weight: 1
`, true)
	f("handler before its deciders, nested", twoProfiles(`{type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider, encode: always-disagg-multimodal-decider}}}`), true)
	f("handler, flat", twoProfiles(`{type: disagg-profile-handler, parameters: {decodeProfile: decode, prefillProfile: prefill, encodeProfile: encode, prefillDeciderPluginName: always-disagg-pd-decider, stageOrder: DECODE_FIRST}}`), true)
	f("handler, flat, older decider name", twoProfiles(`{type: disagg-profile-handler, parameters: {deciderPluginName: always-disagg-pd-decider}}`), true)
	f("prefill first", twoProfiles(`{type: disagg-profile-handler, parameters: {stageOrder: Prefill}}`), true)
	f("deprecated handler", twoProfiles(`{type: pd-profile-handler}`), true)
	f("deprecated handler, oldest parameters", twoProfiles(`{type: pd-profile-handler, parameters: {threshold: 100, hashBlockSize: 5}}`), true)
	f("simulator sample with everything beside", `
featureGates: [dataLayer, prepareDataPlugins]
plugins:
- {type: single-profile-handler}
- {type: decode-filter}
- {type: token-producer, parameters: {estimate: {image: {mode: static, static: {staticToken: 3}}}}}
- {type: metrics-data-source, parameters: {scheme: https, path: /m, port: 9000, interval: 100ms, insecureSkipVerify: false}}
- {type: core-metrics-extractor, parameters: {defaultEngine: sglang, engineConfigs: [{name: mine, queuedRequestsSpec: "q{a=b}"}]}}
- {type: openai-parser}
- {type: inflight-load-producer, parameters: {addEstimatedOutputTokens: true, maxEstimatedOutputTokens: 100}}
- {type: by-label, parameters: {label: a, allowsNoLabel: true}}
- {type: by-label-selector}
- {type: endpoint-notification-source}
- {type: utilization-detector, parameters: {queueDepthThreshold: 3}}
- {type: file-discovery, parameters: {path: endpoints.yaml}}
- {type: prefix-cache-scorer, parameters: {hashBlockSize: 5, maxPrefixBlocksToMatch: 256, lruCapacityPerServer: 31250}}
- {type: random-picker, parameters: {maxNumOfEndpoints: 3}}
schedulingProfiles:
- name: default
  plugins: [{pluginRef: by-label}, {pluginRef: decode-filter}, {pluginRef: prefix-cache-scorer, weight: 50}]
dataLayer:
  sources: [{pluginRef: metrics-data-source, extractors: [{pluginRef: core-metrics-extractor}]}]
requestHandler: {parsers: [{pluginRef: openai-parser}, {pluginRef: passthrough-parser}]}
saturationDetector: {queueDepthThreshold: 5, kvCacheUtilThreshold: 0.8, metricsStalenessThreshold: 200ms}
`, false)
}

func TestRefuses(t *testing.T) {
	f := func(name, text string, want ...string) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			_, err := tryLoad(t, text)
			if err == nil {
				t.Fatalf("loaded, want %q", want)
			}
			if diff := cmp.Diff(want, strings.Split(err.Error(), "\n")); diff != "" {
				t.Error(diff)
			}
		})
	}
	f("every problem at once", `
plugins:
- {type: queue-scorerr}
- {type: precise-prefix-cache-scorer}
- {type: load-aware-scorer, parameters: {treshold: 1}}
- {type: active-request-scorer, parameters: {maxBusyScore: 2}}
- {type: no-such-thing-at-all}
schedulingProfiles:
- name: default
  plugins: [{pluginRef: queue-scorerr}]
`,
		`test.yaml:5: plugins[0].type: unknown plugin type "queue-scorerr", did you mean "queue-scorer"?`,
		`test.yaml:6: plugins[1].type: "precise-prefix-cache-scorer" is known to llm-d, not built in Baton yet`,
		`test.yaml:7: plugins[2].parameters.treshold: unknown key, known here: threshold`,
		`test.yaml:8: plugins[3].parameters.maxBusyScore: 2, must be between 0 and 1`,
		`test.yaml:9: plugins[4].type: unknown plugin type "no-such-thing-at-all", known: `+strings.Join(allTypes(), ", "),
	)
	f("several profiles, no handler", `
plugins: [{type: queue-scorer}]
schedulingProfiles: [{name: a, plugins: [{pluginRef: queue-scorer}]}, {name: b, plugins: [{pluginRef: queue-scorer}]}]
`, `plugins: 2 scheduling profiles need a profile handler, for instance disagg-profile-handler`)
	f("several profiles, single handler", `
plugins: [{type: queue-scorer}, {type: single-profile-handler}]
schedulingProfiles: [{name: a, plugins: [{pluginRef: queue-scorer}]}, {name: b, plugins: [{pluginRef: queue-scorer}]}]
`, `test.yaml:4: single-profile-handler: single-profile-handler takes exactly one scheduling profile, there are 2`)
	f("two handlers", `
plugins: [{type: single-profile-handler}, {type: single-profile-handler, name: second}]
`, `test.yaml:4: second: is a second profile handler beside "single-profile-handler"; exactly one is permitted`)
	f("two pickers", `
plugins: [{type: max-score-picker}, {type: random-picker}]
schedulingProfiles: [{name: a, plugins: [{pluginRef: max-score-picker}, {pluginRef: random-picker}]}]
`, `test.yaml:5: schedulingProfiles[0].plugins[1].pluginRef: profile "a" already has the picker "max-score-picker"`)
	f("no plugin for a profile", `
plugins: [{type: openai-parser}]
schedulingProfiles: [{name: a, plugins: [{pluginRef: openai-parser}]}]
`, `test.yaml:5: schedulingProfiles[0].plugins[0].pluginRef: "openai-parser" (openai-parser) is no filter, scorer or picker`)
	f("flat and nested", twoProfiles(`{type: disagg-profile-handler, parameters: {decodeProfile: decode, deciders: {prefill: always-disagg-pd-decider}}}`),
		`test.yaml:5: plugins[0].parameters: profiles and deciders are given in both spellings; keep profiles{} and deciders{}`)
	f("prefill first with a decider", twoProfiles(`{type: disagg-profile-handler, parameters: {stageOrder: prefill_first, deciders: {prefill: always-disagg-pd-decider}}}`),
		`test.yaml:5: plugins[0].parameters.deciders.prefill: "always-disagg-pd-decider": prefill-first runs prefill always, without a decider`)
	f("stage order", twoProfiles(`{type: disagg-profile-handler, parameters: {stageOrder: encode-first}}`),
		`test.yaml:5: plugins[0].parameters.stageOrder: "encode-first", must be decode-first or prefill-first`)
	f("missing profile", twoProfiles(`{type: disagg-profile-handler, parameters: {profiles: {prefill: pre}}}`),
		`test.yaml:5: disagg-profile-handler: no scheduling profile is named "pre"`)
	f("missing decider", twoProfiles(`{type: disagg-profile-handler, parameters: {deciders: {prefill: nobody}}}`),
		`test.yaml:5: plugins[0].parameters.deciders.prefill: no plugin is named "nobody"`)
	f("a scorer as decider", twoProfiles(`{type: disagg-profile-handler, parameters: {deciders: {prefill: queue-scorer}}}`),
		`test.yaml:5: plugins[0].parameters.deciders.prefill: plugin "queue-scorer" is no decider`)
	f("data parallelism", twoProfiles(`{type: pd-profile-handler, parameters: {primaryPort: 8000}}`),
		`test.yaml:5: plugins[0].parameters.primaryPort: 8000: data parallelism is known to llm-d, not built in Baton yet`)
	f("producer by name", `
plugins: [{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: mine}}]
`, `test.yaml:4: plugins[0].parameters.prefixMatchInfoProducerName: no plugin is named "mine"`)
	f("producer by name, for the prefill's time", `
plugins: [{type: prefill-time-scorer, parameters: {prefixMatchInfoProducerName: mine}}]
`, `test.yaml:4: plugins[0].parameters.prefixMatchInfoProducerName: no plugin is named "mine"`)
	f("parameters out of range", `
plugins:
- {type: prefix-cache-scorer, parameters: {matchLengthWeight: 2}}
- {type: approx-prefix-cache-producer, parameters: {lruCapacityPerServer: -1}}
- {type: inflight-load-producer, parameters: {outputRatio: -1}}
- {type: metrics-data-source, parameters: {scheme: ftp}}
- {type: file-discovery}
- {type: by-label, parameters: {label: a}}
- {type: label-selector-filter, parameters: {matchExpressions: [{key: a, operator: Is}]}}
- {type: session-affinity-scorer, parameters: {strategy: magic}}
- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: -1}}
`,
		`test.yaml:5: plugins[0].parameters.matchLengthWeight: 2, must be between 0 and 1`,
		`test.yaml:6: plugins[1].parameters.lruCapacityPerServer: -1, must be ≥ 0`,
		`test.yaml:7: plugins[2].parameters.outputRatio: -1, must be ≥ 0`,
		`test.yaml:10: plugins[5].parameters.validValues: is required unless allowsNoLabel is true`,
		`test.yaml:11: plugins[6].parameters.matchExpressions[0].operator: "Is", must be In, NotIn, Exists or DoesNotExist`,
		`test.yaml:12: plugins[7].parameters.strategy: "magic", must be encoded_endpoint_header or session_id`,
		`test.yaml:13: plugins[8].parameters.nonCachedTokens: -1, must be ≥ 0`,
	)
}

func TestOptionsAreChecked(t *testing.T) {
	_, err := scheduler.New(scheduler.Options{Plugins: []scheduler.Registry{{"queue-scorer": nil}, {"queue-scorer": nil}}})
	want := []string{
		"scheduler options: Config is required",
		"scheduler options: Metrics is required",
		`plugin type "queue-scorer" is registered twice`,
	}
	if err == nil || cmp.Diff(want, strings.Split(err.Error(), "\n")) != "" {
		t.Errorf("%v, want %q", err, want)
	}
}

func TestWarnings(t *testing.T) {
	s := load(t, `
plugins:
- {type: by-label-selector}
- {type: tokenizer, parameters: {modelName: m}}
- {type: approx-prefix-cache-producer}
- {type: prefix-cache-scorer, parameters: {hashBlockSize: 64}}
`)
	want := []string{
		"test.yaml:5: by-label-selector: type by-label-selector is deprecated: use label-selector-filter",
		"test.yaml:6: tokenizer: type tokenizer is deprecated: use token-producer",
		"test.yaml:6: tokenizer: exact tokens are not built yet: prompts are estimated, four bytes to a token",
		"test.yaml:8: prefix-cache-scorer: its index parameters are ignored: the file defines a prefix producer",
	}
	if diff := cmp.Diff(want, s.Warnings()); diff != "" {
		t.Error(diff)
	}
}

// TestProfileOfEverything: a file without profiles uses every filter and scorer, and its picker.
func TestProfileOfEverything(t *testing.T) {
	s := load(t, `
plugins:
- {type: queue-scorer}
- {type: decode-filter}
- {type: weighted-random-picker, parameters: {maxNumOfEndpoints: 2}}
`, func(o *scheduler.Options) { o.Trace = true })
	snap := pooltest.Snapshot(pooltest.E("a"), pooltest.E("b"), pooltest.E("p").Role("prefill"))
	d, err := s.Schedule(query(snap, "x"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Release()
	if p := d.Phase(scheduler.PhaseDecode); p.Send != 2 || len(p.Ranked) != 2 {
		t.Errorf("send %d of %d, want 2 of 2", p.Send, len(p.Ranked))
	}
	if tr := d.Trace.Profiles[0]; tr.Profile != "default" || tr.Rows[2].RemovedBy != "decode-filter" || len(tr.Scorers) != 1 {
		t.Errorf("trace %+v", tr)
	}
}

// TestReload: the index goes on where its block size is the same, and starts anew where it is not.
func TestReload(t *testing.T) {
	snap := pooltest.Idle(2)
	first := load(t, "plugins: [{type: prefix-cache-scorer}]")
	q := query(snap, strings.Repeat("a", 4096))
	first.Learn(q.Request, snap.Endpoints[0], nil)
	matched := func(text string) int32 {
		s := load(t, text, func(o *scheduler.Options) { o.Previous, o.Metrics = first, nil })
		d, err := s.Schedule(q)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Release()
		return d.Phase(scheduler.PhaseDecode).Ranked[0].Matched
	}
	if got := matched("plugins: [{type: prefix-cache-scorer}, {type: queue-scorer}]"); got != 16 {
		t.Errorf("same block size: matched %d, want 16", got)
	}
	if got := matched("plugins: [{type: prefix-cache-scorer}, {type: approx-prefix-cache-producer, parameters: {blockSizeTokens: 128}}]"); got != 0 {
		t.Errorf("other block size: matched %d, want 0", got)
	}
}
