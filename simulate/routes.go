// SPDX-License-Identifier: Apache-2.0

package simulate

import "net/http"

// route is what one path answers.
type route struct {
	method string // besides HEAD for GET
	api    api
	serve  func(p *process, x *exchange)
}

// routeOf finds the handler of a path of p's engine; nil for an unknown one.
func (p *process) routeOf(path string) *route {
	if p.e.opts.Engine == engineSGLang {
		if rt := sglangRoute(path); rt != nil {
			return rt
		}
	}
	return routeOf(path)
}

// routeOf finds the handler of a path that every engine has.
func routeOf(path string) *route {
	switch path {
	case "/v1/completions":
		return &route{http.MethodPost, apiCompletions, (*process).generate}
	case "/v1/chat/completions":
		return &route{http.MethodPost, apiChat, (*process).generate}
	case "/v1/responses":
		return &route{http.MethodPost, apiResponses, (*process).generate}
	case "/v1/messages":
		return &route{http.MethodPost, apiMessages, (*process).generate}
	case "/inference/v1/generate":
		return &route{http.MethodPost, apiGenerate, (*process).generate}
	case "/v1/completions/render", "/v1/chat/completions/render":
		return &route{http.MethodPost, apiCompletions, (*process).serveRender}
	case "/v1/embeddings":
		return &route{"", apiCompletions, (*process).serveEmbeddings}
	case "/v1/messages/count_tokens":
		return &route{http.MethodPost, apiMessages, (*process).serveCountTokens}
	case "/tokenize":
		return &route{http.MethodPost, apiCompletions, (*process).serveTokenize}
	case "/detokenize":
		return &route{http.MethodPost, apiCompletions, (*process).serveDetokenize}
	case "/reset_prefix_cache":
		return &route{http.MethodPost, apiCompletions, (*process).serveResetCache}
	case "/v1/models":
		return &route{http.MethodGet, apiCompletions, (*process).serveModels}
	case "/health", "/ping":
		return &route{http.MethodGet, apiCompletions, (*process).serveHealth}
	case "/weight_info":
		return &route{http.MethodGet, apiCompletions, (*process).serveWeightInfo}
	case "/version":
		return &route{http.MethodGet, apiCompletions, (*process).serveVersion}
	case "/kv_event_sources":
		return &route{http.MethodGet, apiCompletions, (*process).serveEventSources}
	case "/load":
		return &route{http.MethodGet, apiCompletions, (*process).serveLoad}
	case "/metrics", "/metrics/", "/prometheus/metrics":
		return &route{http.MethodGet, apiCompletions, (*process).serveMetrics}
	}
	return adminRoute(path)
}

// adminRoute finds the handler of a path that no real server has.
func adminRoute(path string) *route {
	switch path {
	case "/admin/faults":
		return &route{"", apiCompletions, (*process).serveFaults}
	case "/admin/clock":
		return &route{http.MethodPost, apiCompletions, (*process).serveClock}
	case "/admin/kill":
		return &route{http.MethodPost, apiCompletions, (*process).serveKill}
	case "/admin/state":
		return &route{http.MethodGet, apiCompletions, (*process).serveState}
	}
	return nil
}
