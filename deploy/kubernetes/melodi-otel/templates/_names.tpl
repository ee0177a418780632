{{- define "melodi-otel.name" -}}
{{- printf "%s-agent" (.Release.Name | trunc 50 | trimSuffix "-") -}}
{{- end -}}

{{- define "melodi-otel.selector" -}}
app.kubernetes.io/name: melodi-otel-agent
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "melodi-otel.labels" -}}
{{ include "melodi-otel.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "melodi-otel.account" -}}
{{- default (include "melodi-otel.name" .) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "melodi-otel.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}
