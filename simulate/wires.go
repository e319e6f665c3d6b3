// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Values of [Options.Engine]; "" is vLLM.
const (
	engineVLLM   = "vllm"
	engineSGLang = "sglang"
	engineTRTLLM = "trtllm"
)

// Values of [Options.Connector] for vLLM; "" is NIXL.
const (
	connectorNIXL     = "nixlv2"
	connectorPush     = "nixl-push"
	connectorMoRIIO   = "moriio"
	connectorMooncake = "mooncake"
	connectorOffload  = "offloading"
	connectorStorage  = "shared-storage" // a store that all engines share, LMCache as a cache included
	connectorLMCache  = "lmcache-pd"
)

// Labels of an endpoints file.
const (
	labelRole         = "llm-d.ai/role"
	labelEngineType   = "llm-d.ai/engine-type"
	labelSidecar      = "baton-epp/sidecar"
	labelMooncakePort = "baton-epp/mooncake-port"
	labelP2PPort      = "baton-epp/p2p-port"
)

// wireKind is one way to move KV blocks.
type wireKind struct {
	engine, connector string
	hold              time.Duration                     // how long blocks wait for the decode leg; [Options.Lease] overrides it
	make              func(p *process) wire             // nil where NIXL's own path is used
	labels            func(e *Engine) map[string]string // of the endpoints file; nil for none
	blind             bool                              // neither leg says that there is another
}

// wireKinds are all of them. Mooncake's is VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT, push's push_registration_timeout.
func wireKinds() []wireKind {
	return []wireKind{
		{engine: engineVLLM, connector: connectorNIXL, hold: 30 * time.Second},
		{engine: engineVLLM, connector: connectorPush, hold: 480 * time.Second},
		{engine: engineVLLM, connector: connectorMoRIIO, hold: 30 * time.Second, make: newMoRIIO},
		{engine: engineVLLM, connector: connectorMooncake, hold: 480 * time.Second, make: newMooncake, labels: portLabel(labelMooncakePort, (*Engine).BootstrapPort)},
		{engine: engineVLLM, connector: connectorOffload, hold: 60 * time.Second, make: newOffloading, labels: portLabel(labelP2PPort, (*Engine).P2PPort)},
		{engine: engineVLLM, connector: connectorStorage, make: newStorage, blind: true},
		{engine: engineVLLM, connector: connectorLMCache, hold: 60 * time.Second, make: newLMCachePD, labels: lmcacheLabels, blind: true},
		{engine: engineSGLang, hold: 300 * time.Second, make: newSGLang, labels: sglangLabels},
		{engine: engineSGLang, connector: backendMooncake, hold: 300 * time.Second, make: newSGLang, labels: sglangLabels},
		{engine: engineSGLang, connector: backendNIXL, make: newSGLang, labels: sglangLabels},
		{engine: engineTRTLLM, hold: 60 * time.Second, make: newTRTLLM},
	}
}

// portLabel is the label of a port.
func portLabel(name string, port func(*Engine) int) func(*Engine) map[string]string {
	return func(e *Engine) map[string]string { return map[string]string{name: strconv.Itoa(port(e))} }
}

// wireKindOf finds the row of an engine and its connector; ok is false for an unknown pair.
func wireKindOf(engine, connector string) (k wireKind, ok bool) {
	if engine == "" {
		engine = engineVLLM
	}
	if connector == "" && engine == engineVLLM {
		connector = connectorNIXL
	}
	for _, k = range wireKinds() {
		if k.engine == engine && k.connector == connector {
			return k, true
		}
	}
	return wireKind{}, false
}

// wireNames lists the known pairs, for messages.
func wireNames() string {
	kinds := wireKinds()
	names := make([]string, 0, len(kinds))
	for _, k := range kinds {
		names = append(names, strings.TrimSuffix(k.engine+" "+k.connector, " "))
	}
	return strings.Join(names, ", ")
}

// newWire makes the wire of p's engine; nil for NIXL.
func newWire(p *process) wire {
	if k, ok := wireKindOf(p.e.opts.Engine, p.e.opts.Connector); ok && k.make != nil {
		return k.make(p)
	}
	return nil
}

// Labels are what an endpoints file says about the engine, beside its address.
func (e *Engine) Labels() map[string]string {
	out := map[string]string{labelSidecar: "false"}
	if e.opts.Role != "" {
		out[labelRole] = e.opts.Role
	}
	switch e.opts.Engine {
	case engineSGLang:
		out[labelEngineType] = "sglang"
	case engineTRTLLM:
		out[labelEngineType] = "trtllm-serve"
	}
	if k, ok := wireKindOf(e.opts.Engine, e.opts.Connector); ok && k.labels != nil {
		maps.Copy(out, k.labels(e))
	}
	return out
}

// labelLines writes the engine's labels as YAML after indent: the role, then the others sorted.
func (e *Engine) labelLines(indent string) string {
	labels := e.Labels()
	var b strings.Builder
	line := func(k string) { b.WriteString(indent + k + ": " + yamlText(labels[k]) + "\n") }
	if e.opts.Role != "" {
		line(labelRole)
	}
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		if k != labelRole {
			line(k)
		}
	}
	return b.String()
}

// yamlText quotes what YAML would not read as text.
func yamlText(s string) string {
	if s == "" || s == "true" || s == "false" || (s[0] >= '0' && s[0] <= '9') || strings.ContainsAny(s, ":#{}[],&*!|>'\"%@`") {
		return strconv.Quote(s)
	}
	return s
}
